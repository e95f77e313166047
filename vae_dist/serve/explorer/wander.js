// Texts around a text or a latent. A step makes a neighbour's latent the centre; the trail leads back.

import { ask, chosenModel } from "./api.js";
import { element, shown } from "./element.js";
import { pack, unpack } from "./latent.js";

const COUNT = 9;
const trail = [];

export async function wander({ values, signal, go, address, section }) {
  const { input, z, radius, seed } = values;
  const centre = z ? { latent: unpack(z) } : { input };
  const body = { ...centre, radius: Number(radius), seed: Number(seed), n: COUNT };
  const { reconstruction, choices } = await ask("v1/neighbors", body, signal);
  follow({ input, z, text: z ? reconstruction : input, model: chosenModel() });
  section.querySelector(".trail").replaceChildren(crumbs(values, address));
  const rows = choices.map((choice) => {
    const step = () => go({ ...values, z: pack(choice.latent) });
    return element("li", {}, element("button", { type: "button", onclick: step }, shown(choice.text)));
  });
  return [
    element("p", { className: "chosen" }, shown(reconstruction)),
    element("p", { className: "note" }, `${z ? "The centre." : `Reconstructed from: ${input}.`} Around it, at a distance of ${radius}:`),
    element("ol", { className: "around" }, ...rows),
  ];
}

// A place that was passed before ends the trail there again; another sentence or model begins a new one.
function follow(place) {
  if (trail.length && (trail[0].input !== place.input || trail[0].model !== place.model)) trail.length = 0;
  const before = trail.findIndex((one) => one.z === place.z);
  trail.splice(before < 0 ? trail.length : before, before < 0 ? 0 : trail.length, place);
}

function crumbs(values, address) {
  const items = trail.map((place, i) => {
    const link = element("a", { href: address({ ...values, z: place.z }) }, shown(place.text));
    if (i === trail.length - 1) link.setAttribute("aria-current", "location");
    return element("li", {}, link);
  });
  return element("ol", {}, ...items);
}
