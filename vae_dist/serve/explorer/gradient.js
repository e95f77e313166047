// Texts between two texts. The slider chooses the point that is shown large and is part of the address.

import { ask } from "./api.js";
import { element, shown } from "./element.js";

const STEPS = 7;

export async function gradient({ values, signal, remember }) {
  const { a, b, path } = values;
  const { points } = await ask("v1/interpolate", { a, b, path, steps: STEPS }, signal);
  const chosen = element("p", { className: "chosen" });
  const at = element("output");
  const slider = element("input", { type: "range", min: 0, max: STEPS - 1, step: 1, value: values.at ?? (STEPS - 1) / 2 });
  const rows = points.map((point, i) => row(point, { 0: a, [STEPS - 1]: b }[i]));
  const choose = () => {
    rows.forEach((one, i) => one.setAttribute("aria-current", i === Number(slider.value)));
    const point = points[slider.value];
    at.textContent = point.t.toFixed(2);
    chosen.textContent = shown(point.text);
    slider.setAttribute("aria-valuetext", `${at.textContent}: ${chosen.textContent}`);
  };
  slider.addEventListener("input", choose);
  slider.addEventListener("change", () => remember({ ...values, at: slider.value }));
  choose();
  return [
    chosen,
    element("label", { className: "slide travel" }, "Point t on the way", slider, at),
    element("ol", { className: "ribbon" }, ...rows),
  ];
}

function row(point, original) {
  const made = element("li", {}, element("span", {}, point.t.toFixed(2)), element("span", {}, shown(point.text)));
  if (original) made.append(element("span", { className: "original" }, `reconstructed from: ${original}`));
  return made;
}
