// The latent of a sentence, dimension by dimension: what each costs, and a slider that moves it.

import { ask } from "./api.js";
import { element } from "./element.js";
import { pack, unpack } from "./latent.js";
import { liveText } from "./live.js";

const DEAD_NATS = 0.01;

export async function dimensions({ values, signal, remember, report }) {
  const [posterior] = (await ask("v1/encode", { input: [values.input] }, signal)).data;
  if (Array.isArray(posterior.mean[0])) throw new Error("This panel needs a model with one latent a text; here every token has one.");
  const z = values.z ? unpack(values.z) : [...posterior.mean];
  if (z.length !== posterior.mean.length) throw new Error("The latent in the address is another model's. Start from a sentence.");
  const live = liveText(signal, report);
  const move = (d, value) => {
    z[d] = value;
    live.later(z, () => remember({ ...values, z: pack(z) }));
  };
  await live.decode(z);
  return [live.node, ...bars(posterior, z, move)];
}

function bars({ mean, logvar }, z, move) {
  const kl = mean.map((m, d) => 0.5 * (m * m + Math.exp(logvar[d]) - 1 - logvar[d]));
  const most = Math.max(...kl), order = kl.map((_, d) => d).sort((i, j) => kl[j] - kl[i]);
  const dead = kl.filter((one) => one < DEAD_NATS).length, total = kl.reduce((sum, one) => sum + one, 0);
  const note = `A slider is the value of a dimension, the bar below it what the sentence costs there: its KL against a standard normal, `
    + `the largest first. In all ${total.toFixed(1)} nats in ${kl.length} dimensions, ${dead} of them dead, under ${DEAD_NATS} (grey).`;
  return [
    element("p", { className: "note" }, note),
    element("ul", { className: "dims" }, ...order.map((d) => row(d, kl[d], kl[d] / most, z[d], move))),
  ];
}

function row(d, kl, share, value, move) {
  const reach = Math.max(4, Math.ceil(Math.abs(value)));
  const at = element("output", {}, value.toFixed(2));
  const slider = element("input", { type: "range", min: -reach, max: reach, step: "any", value });
  slider.addEventListener("input", () => {
    at.textContent = Number(slider.value).toFixed(2);
    move(d, Number(slider.value));
  });
  const bar = element("span", { className: "bar", ariaHidden: "true" });
  bar.style.setProperty("--share", share);
  const cost = element("span", { className: "kl", title: "KL, nats" }, kl.toFixed(2));
  const label = element("label", {}, `z${d}`, slider, at, bar, cost);
  return element("li", { className: kl < DEAD_NATS ? "dead" : "" }, label);
}
