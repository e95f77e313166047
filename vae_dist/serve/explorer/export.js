// What can be taken away: the map's latents for the Embedding Projector, and what was seen here as one page.

import { ask, chosenModel, toModel } from "./api.js";
import { element } from "./element.js";
import { recordedLatents } from "./map.js";
import { onePage } from "./one_page.js";
import { keep, record, recording } from "./recording.js";

export async function exports({ signal, report }) {
  const info = await ask("v1/info", null, signal), map = await ask("v1/map", null, signal);
  // For the panel that a recording always has.
  await ask("readyz", null, signal);
  await ask("metrics", null, signal);
  return [...latents(map, report), ...(recording ? [] : visited(info, map, report, signal))];
}

function latents({ points }, report) {
  if (!points.length) return part("Latents of the map", "There is no map here.");
  const about = `Posterior means of ${points.length.toLocaleString("en")} texts, and the texts, for the Embedding Projector `
    + "(projector.tensorflow.org, Load) and whatever reads tab-separated values.";
  return part("Latents of the map", about, button("tensors.tsv", () => tensors(points), report), button("metadata.tsv", () => metadata(points), report));
}

function visited(info, map, report, signal) {
  const about = "Everything that you have seen here since the page was loaded, in one HTML file with the service's real answers, and the map. "
    + "It works without a service, from a disk or any static host. The map's texts and your sentences are in it.";
  const make = async () => {
    if (map.points.length) await askAll(recordedLatents(map), info.limits.rows, signal);
    return onePage({ ...record(info.model), chosen: chosenModel() });
  };
  return part("This visit as a page", about, button("latent-space.html", make, report));
}

// Many at once, and each kept as if it had been asked for alone: the service answers both alike.
async function askAll(latents, most, signal) {
  for (let start = 0; start < latents.length; start += most) {
    const some = latents.slice(start, start + most);
    const { choices } = await ask("v1/decode", { latent: some }, signal);
    some.forEach((z, i) => keep(...toModel("v1/decode", { latent: [z] }), { choices: [choices[i]] }));
  }
}

function part(title, text, ...buttons) {
  return [element("h2", {}, title), element("p", { className: "note" }, text), element("div", { className: "buttons" }, ...buttons)];
}

function button(file, make, report) {
  const save = async () => {
    try {
      download(file, await make());
      report(null);
    } catch (error) {
      report(error);
    }
  };
  return element("button", { type: "button", className: "plain", onclick: save }, `Save ${file}`);
}

function download(file, text) {
  const address = URL.createObjectURL(new Blob([text]));
  element("a", { href: address, download: file }).click();
  URL.revokeObjectURL(address);
}

const tensors = (points) => points.map((point) => `${point.latent.join("\t")}\n`).join("");

function metadata(points) {
  const rows = points.map(({ text, source, tokens, kl }) => [text.replace(/\s+/g, " "), source, tokens, kl.toFixed(3)].join("\t"));
  return ["text\tsource\ttokens\tkl", ...rows, ""].join("\n");
}
