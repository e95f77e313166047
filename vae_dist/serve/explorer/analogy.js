// a is to b as c is to the answer.

import { ask } from "./api.js";
import { element, pairs, shown } from "./element.js";

export async function analogy({ values, signal }) {
  const { a, b, c } = values;
  const { reconstructions, choices } = await ask("v1/analogy", { a, b, c, strength: Number(values.strength) }, signal);
  const names = ["First", "Second", "Third"];
  return [
    element("p", { className: "chosen" }, shown(choices[0].text)),
    element("h2", {}, "What the model makes of the three"),
    pairs(names.map((name, i) => [name, shown(reconstructions[i])])),
  ];
}
