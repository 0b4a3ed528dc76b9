/** The run page's keys: through the told steps, live, the heatmap's other view, all steps. */
import { whole } from "../data/format";
import type { RunStore } from "../data/store";
import { toldBeside } from "../data/told";
import { byId } from "./dom";
import { initKeys } from "./keys";

export function initRunKeys(store: RunStore): void {
  const onlyLive = (act: () => string) => () => (byId("panel-live").hidden ? undefined : act());
  const by = (steps: 1 | -1) =>
    onlyLive(() => {
      if (store.lastStep) store.setStep(toldBeside(store, steps));
      return `step ${whole(store.step)}`;
    });
  const turn = () => {
    const other = byId(byId("view-layers").getAttribute("aria-pressed") === "true" ? "view-steps" : "view-layers");
    other.click();
    return `heatmap: ${other.textContent}`;
  };
  initKeys([
    { key: "l", does: "Follow the newest step, or stay", act: onlyLive(() => (byId("follow").click(), store.follow ? "following the newest step" : `staying at step ${whole(store.step)}`)), control: "#follow" },
    { key: ",", does: "The told step before", act: by(-1) },
    { key: ".", does: "The told step after", act: by(1) },
    { key: "a", does: "Show all steps", act: onlyLive(() => (store.setRange(null), "all steps")), control: "#range-all" },
    { key: "v", does: "The heatmap's other view", act: onlyLive(turn) },
    { key: "← ↑ ↓ →", does: "On the heatmap: from cell to cell, or step to step; Enter follows the expert" },
  ]);
}
