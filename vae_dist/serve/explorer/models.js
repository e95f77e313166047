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
  list.addEventListener("change", () => change(list.value));
  label.hidden = names.length < 2;
  showModel();
}

export function showModel() {
  list.value = chosenModel() ?? list.options[0]?.value;
}
