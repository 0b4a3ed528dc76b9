/** The tail of the log: the last part over REST, then live; sticks to the end until the reader scrolls away. */
import { getText } from "../data/api";
import type { RunStore } from "../data/store";
import { byId } from "./dom";

const TAIL_BYTES = 64_000;
const MAX_CHARS = 400_000;
const byteLength = (text: string): number => new TextEncoder().encode(text).length;

export function initLog(store: RunStore, logSize: number): void {
  const box = byId("log");
  let next = -1;
  let loading: Promise<void> | null = null;
  const append = (text: string) => {
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    box.append(text);
    if (box.textContent!.length > MAX_CHARS) box.textContent = box.textContent!.slice(-MAX_CHARS / 2);
    if (atEnd) box.scrollTop = box.scrollHeight;
    byId("log-empty").hidden = box.textContent !== "";
  };
  const load = async (from: number) => {
    const { text, nextOffset } = await getText(`/runs/${store.run.id}/logs?offset=${from}&limit=1000000`);
    next = nextOffset || from + byteLength(text);
    append(text);
    box.scrollTop = box.scrollHeight;
  };
  const ensure = (from: number) => (loading ??= load(from).catch(() => undefined).finally(() => (loading = null)));
  store.logListeners.add((offset, text) => {
    if (next < 0 || loading) return;
    if (offset > next) return void ensure(next);
    const end = offset + byteLength(text);
    if (end <= next) return;
    append(offset === next ? text : new TextDecoder().decode(new TextEncoder().encode(text).slice(next - offset)));
    next = end;
  });
  store.on("reload", () => {
    box.textContent = "";
    next = -1;
    void ensure(0);
  });
  void ensure(Math.max(logSize - TAIL_BYTES, 0));
}
