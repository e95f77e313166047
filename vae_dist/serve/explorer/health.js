// What the service says of itself.

import { ask } from "./api.js";
import { element, pairs } from "./element.js";

export async function health({ signal }) {
  const ready = await ask("readyz", null, signal).then(() => "Ready", (error) => {
    if (error.name === "AbortError") throw error;
    return `Not ready: ${error.message}`;
  });
  const info = await ask("v1/info", null, signal), metrics = await ask("metrics", null, signal);
  const number = (value) => (typeof value === "number" ? value.toLocaleString("en") : String(value));
  return [
    element("p", { className: "chosen" }, ready),
    pairs([
      ["Model", info.model],
      ["Throughput", `${number(Math.round(total(metrics, "tokens_per_second", info.model)))} tokens a second, over the last ten`],
      ["Rows being decoded", `${total(metrics, "slots_active", info.model)} of ${total(metrics, "slots", info.model)}`],
      ["Rows waiting", number(total(metrics, "rows_waiting", info.model))],
      ["Parameters", number(info.parameters)],
      ["Latent dimensions", number(info.latent_dim)],
      ["Prior", info.prior],
      ["Vocabulary", number(info.vocab_size)],
      ["Longest text", `${number(info.max_tokens)} tokens`],
      ...Object.entries(info.provenance).filter(([name]) => name !== "run").map(([name, value]) => [words(name), number(value)]),
      ...Object.entries(info.limits).map(([name, value]) => [`Most ${name} a request`, number(value)]),
      ["Weights, SHA-256", info.weights_sha256],
      ["vae_dist", info.vae_dist_version],
    ]),
  ];
}

// Of all replicas, from what Prometheus reads.
function total(metrics, name, model) {
  const lines = metrics.split("\n").filter((line) => line.startsWith(`vae_dist_${name}{`) && line.includes(`model="${model}"`));
  return lines.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

function words(name) {
  const spaced = name.replaceAll("_", " ");
  return spaced[0].toUpperCase() + spaced.slice(1);
}
