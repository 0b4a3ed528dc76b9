/** What a queued run waits for: told with the page, and asked for again while the run is queued, as workers come and go. */
import type { RunStore } from "../data/store";

const ASK_MS = 10_000;

/** Gives what was heard last, `known` at first; `heard` is called when there is something new. */
export function initWaiting(store: RunStore, known: string, heard: () => void): () => string {
  let queued = store.run.state === "queued";
  const ask = async () => {
    if (store.run.state !== "queued" || document.hidden) return;
    const answer = await fetch(`/runs/${store.run.id}/panel/waiting`, { headers: { "HX-Request": "true" } });
    if (!answer.ok) return;
    known = await answer.text();
    heard();
  };
  // What cannot be asked now is asked again; the banner tells of a lost connection.
  const tryAsking = () => void ask().catch(() => undefined);
  setInterval(tryAsking, ASK_MS);
  store.on("run", () => {
    const before = queued;
    queued = store.run.state === "queued";
    if (!queued) known = "";
    else if (!before) tryAsking();
  });
  return () => known;
}
