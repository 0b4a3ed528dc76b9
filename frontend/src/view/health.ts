/** The line under the figures: how the router fares at the chosen step. */
import { WINDOW, healthOf } from "../data/health";
import type { RunStore } from "../data/store";
import { setText } from "./dom";
import { throttled } from "./frame";

export function initHealth(store: RunStore): void {
  const line = document.getElementById("health");
  if (!line) return; // a dense model
  const draw = throttled(500, () => {
    const found = healthOf(store.snapshots.upTo(store.step, WINDOW), store.run.moe_layers, store.run.top_k);
    if (!found && store.snapshots.at(store.step) === undefined) return; // still on its way
    line.hidden = !found;
    line.dataset.kind = found?.kind ?? "";
    setText(line, found?.text ?? "");
  });
  store.on(["snapshot", "cursor", "steps", "run"], draw);
  draw();
}
