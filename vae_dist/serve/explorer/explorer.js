// The page: form -> address -> panel. A form writes its values into the address, and what the address says is shown, so
// that links, the back button and a submitted form go the same way.

import { analogy } from "./analogy.js";
import { chosenModel } from "./api.js";
import { dimensions } from "./dimensions.js";
import { element } from "./element.js";
import { exports } from "./export.js";
import { gradient } from "./gradient.js";
import { health } from "./health.js";
import { map } from "./map.js";
import { offerModels, showModel } from "./models.js";
import { recording, visit, visited } from "./recording.js";
import { wander } from "./wander.js";

const panels = { gradient, wander, analogy, map, dimensions, export: exports, health };
const ALWAYS = ["map", "export", "health"]; // have nothing that must be filled in
const running = {};
let model = chosenModel();

// What is linked from here asks the same model.
function address(name, values, model = chosenModel() ?? "") {
  const filled = Object.entries({ ...values, model }).filter(([, value]) => value !== "" && value !== undefined);
  return `#${name}${filled.length ? `?${new URLSearchParams(filled)}` : ""}`;
}

function read() {
  const [name, query] = location.hash.slice(1).split(/\?(.*)/s);
  const { model: _, ...values } = Object.fromEntries(new URLSearchParams(query ?? ""));
  return { name: Object.hasOwn(panels, name) ? name : "gradient", values };
}

function go(name, values) {
  const hash = address(name, values);
  if (hash === location.hash) show();
  else location.hash = hash;
}

function show() {
  const { name, values } = read();
  for (const other of Object.keys(panels)) document.getElementById(other).hidden = other !== name;
  for (const link of document.querySelectorAll("header nav a")) {
    const to = link.hash.slice(1).split("?")[0];
    link.setAttribute("href", address(to, {}));
    if (to === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (model !== chosenModel()) forget();
  const section = document.getElementById(name);
  document.title = `${section.querySelector("h1").textContent} · Latent space explorer`;
  if (Object.keys(values).length) fill(section.querySelector("form"), values);
  if (Object.keys(values).length || ALWAYS.includes(name)) run(name, section, values);
  else if (recording && visited(name).length) location.replace(visited(name)[0].address);
}

// What is shown is another model's.
function forget() {
  model = chosenModel();
  for (const name of Object.keys(panels)) {
    running[name]?.abort();
    for (const made of document.querySelectorAll(`#${name} :is(.results, .trail, .error)`)) made.replaceChildren();
  }
  showModel();
}

// The same question to another model; a latent would mean nothing there.
function change(chosen) {
  const { name } = read(), form = document.querySelector(`#${name} form`);
  const asked = form && name in running ? Object.fromEntries(new FormData(form)) : {};
  location.hash = address(name, { ...asked, z: "" }, chosen);
}

function fill(form, values) {
  for (const field of form?.elements ?? []) {
    if (field.type === "radio") field.checked = field.value === (values[field.name] ?? field.value);
    else if (field.name) field.value = values[field.name] ?? (field.type === "hidden" ? "" : field.defaultValue);
  }
  if (form) showNumbers(form);
}

async function run(name, section, values) {
  running[name]?.abort();
  const { signal } = (running[name] = new AbortController());
  const results = section.querySelector(".results"), complaint = section.querySelector(".error");
  const form = section.querySelector("form");
  const report = (error) => {
    if (error?.name !== "AbortError") complaint.textContent = error?.message ?? "";
  };
  let here = location.hash || `#${name}`;
  const seen = (now) => {
    if (!recording) visit(name, now, titleOf(section, now), here);
    here = now;
  };
  const context = {
    values: { ...(form && Object.fromEntries(new FormData(form))), ...values },
    signal,
    section,
    report,
    go: (more) => go(name, more),
    address: (more) => address(name, more),
    link: address,
    remember: (more) => {
      if (signal.aborted || read().name !== name) return;
      history.replaceState(null, "", address(name, more));
      seen(location.hash);
    },
  };
  report(null);
  results.setAttribute("aria-busy", "true");
  try {
    const made = await panels[name](context);
    if (signal.aborted) return;
    const had = results.contains(document.activeElement);
    results.replaceChildren(...made);
    seen(here);
    // What was focused is gone: the keyboard goes on from here.
    if (had) results.focus();
  } catch (error) {
    report(error);
  }
  if (running[name].signal === signal) results.removeAttribute("aria-busy");
  offerModels(change);
}

// What was asked; where a latent was, its text.
function titleOf(section, address) {
  const asked = [...section.querySelectorAll("textarea")].map((field) => field.value).join(" → ");
  const found = section.querySelector(".chosen")?.textContent;
  return (/[?&]z=/.test(address) ? found : asked) || asked || section.querySelector("h1").textContent;
}

function showNumbers(form) {
  for (const output of form.querySelectorAll("output")) output.textContent = output.parentElement.querySelector("input").value;
}

function listen(name, form) {
  const typed = [...form.querySelectorAll("textarea")];
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    go(name, Object.fromEntries(new FormData(form)));
  });
  form.addEventListener("input", (event) => {
    // Another sentence is another place: a latent from before does not belong to it.
    if (typed.includes(event.target) && form.elements.z) form.elements.z.value = "";
    showNumbers(form);
  });
  form.addEventListener("change", (event) => {
    if (!typed.includes(event.target) && name in running) form.requestSubmit();
  });
  form.addEventListener("keydown", (event) => {
    // A sentence is one line: Enter asks, as in a search box.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || !typed.includes(event.target)) return;
    event.preventDefault();
    form.requestSubmit();
  });
  showNumbers(form);
}

// A recording has no forms but a list of what was asked.
function listVisits(name) {
  const section = document.getElementById(name), form = section.querySelector("form");
  form?.remove();
  if (ALWAYS.includes(name)) return;
  const links = visited(name).map((one) => element("li", {}, element("a", { href: one.address }, one.title)));
  const nothing = "Nothing was recorded here. This panel needs a service: vae-dist serve MODEL";
  const list = links.length ? ["Recorded here:", element("ul", {}, ...links)] : [nothing];
  section.querySelector(".lead").after(element("nav", { className: "recorded", ariaLabel: "Recorded" }, ...list));
}

if (recording) {
  for (const name of Object.keys(panels)) listVisits(name);
  // The panels that are always there are of the model that was chosen last.
  if (recording.chosen && !location.hash) history.replaceState(null, "", address("gradient", {}, recording.chosen));
  document.querySelector("footer p").textContent = `A recording of the model ${recording.model}, made on ${recording.at}: real answers, `
    + "but only to what was asked then. With a service (vae-dist serve MODEL) you can ask anything.";
}
for (const name of Object.keys(panels)) {
  const form = document.querySelector(`#${name} form`);
  if (form) listen(name, form);
}
document.querySelector("#skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.querySelector("#main").focus();
});
addEventListener("hashchange", show);
show();
offerModels(change);
