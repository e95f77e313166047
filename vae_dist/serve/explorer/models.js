// The choice among the service's models, where it has several.

import { chosenModel, send } from "./api.js";
import { element } from "./element.js";
import { recording } from "./recording.js";

const label = document.querySelector("#model"), list = label.querySelector("select");
let known = false;

// Asked again after each answer until it succeeds: a page without a key is not told.
export async function offerModels(change) {
  if (known || recording) return;
  // What is wrong with the service is said where something was asked.
  const answer = await send("v1/models").catch(() => null);
  if (!answer?.ok || known) return;
  known = true;
  const names = (await answer.json()).data.map(({ id }) => id);
  list.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  // An address that names no model means the first.
  list.addEventListener("change", () => change(list.selectedIndex ? list.value : ""));
  showModel();
}

// Also where the address names one that is not there: the way back.
export function showModel() {
  const chosen = chosenModel();
  list.value = chosen ?? list.options[0]?.value;
  label.hidden = !known || (list.options.length < 2 && (chosen === undefined || list.selectedIndex === 0));
}
