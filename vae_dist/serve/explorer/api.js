// Questions to the service, with a key where it wants one, and its refusals in words. A recording answers in its place.

import { keep, recorded, recording } from "./recording.js";

const dialog = document.querySelector("#key");
let asked = null;

// The model that the address names; without one the service takes its first.
export const chosenModel = () => new URLSearchParams(location.hash.split(/\?(.*)/s)[1] ?? "").get("model") ?? undefined;

// A question as it is sent: to the chosen model, where it is one to a model.
export function toModel(path, body) {
  const model = chosenModel();
  if (!model || !path.startsWith("v1/")) return [path, body];
  return body ? [path, { ...body, model }] : [`${path}?${new URLSearchParams({ model })}`, body];
}

export async function ask(question, content, signal) {
  const [path, body] = toModel(question, content);
  if (recording) return recorded(path, body);
  for (let refused = false; ; refused = true) {
    const answer = await send(path, body, signal);
    if (answer.status === 401) {
      await newKey(refused);
      continue;
    }
    const isJson = answer.headers.get("content-type")?.startsWith("application/json");
    const found = await (isJson ? answer.json() : answer.text()).catch(() => null);
    if (answer.ok && found) return keep(path, body, found);
    throw new Error(inWords(answer, found));
  }
}

export async function send(path, body, signal) {
  const headers = body ? { "content-type": "application/json" } : {};
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = `Bearer ${key}`;
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service cannot be reached. Is it running, and are you online?");
  }
}

function inWords(answer, found) {
  if (answer.status === 429) return `The service is busy. Try again in ${answer.headers.get("retry-after") ?? "a few"} s.`;
  const detail = found?.detail;
  if (typeof detail === "string") return detail;
  // Fields that the service checked, each with its reason; names and messages come as quoted ASCII.
  const bare = (text) => String(text).replace(/^['"]|['"]$/g, "");
  if (Array.isArray(detail)) return detail.map((one) => `${bare(one.loc.at(-1))}: ${bare(one.msg)}`).join(". ");
  return `The service answered ${answer.status} ${answer.statusText}. Try again; its log says more.`;
}

// One dialog, however many questions wait for it. Cancel is an error that they all report.
function newKey(refused) {
  asked ??= openDialog(refused).finally(() => (asked = null));
  return asked;
}

function openDialog(refused) {
  const form = dialog.querySelector("form");
  form.reset();
  dialog.querySelector(".error").textContent = refused ? "The service does not know this key." : "";
  dialog.showModal();
  return new Promise((use, cancel) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("key", form.elements.key.value.trim());
      form.reset();
      use();
      dialog.close();
    };
    form.querySelector(".plain").onclick = () => dialog.close();
    dialog.onclose = () => cancel(new Error("The service answers only with a key."));
  });
}
