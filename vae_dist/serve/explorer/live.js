// The text of a latent that moves: asked for once it rests, and only the last answer counts.

import { ask } from "./api.js";
import { element, shown } from "./element.js";

const PAUSE_MS = 150;

export function liveText(signal, report) {
  const text = element("p", { className: "chosen" });
  let timer, latest = 0;
  const decode = async (z) => {
    const turn = ++latest;
    try {
      const { choices } = await ask("v1/decode", { latent: [z] }, signal);
      if (turn !== latest) return false;
      text.textContent = shown(choices[0].text);
      report(null);
      return true;
    } catch (error) {
      // The text from before is not that of this latent.
      if (turn === latest) text.textContent = "…";
      report(error);
      return false;
    }
  };
  const later = (z, then) => {
    clearTimeout(timer);
    timer = setTimeout(async () => (await decode(z)) && then(), PAUSE_MS);
  };
  const node = element("div", { className: "live" }, text);
  node.setAttribute("aria-live", "polite");
  return { node, decode, later };
}
