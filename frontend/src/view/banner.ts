/** Says when the live connection is gone, when it is tried again, and lets the reader try now. */
import type { LiveSocket, Status } from "../data/socket";
import { byId, setText } from "./dom";

/** A drop shorter than this is not worth a word. */
const QUIET_MS = 1200;

export function initBanner(socket: LiveSocket): (status: Status) => void {
  const banner = byId("disconnected");
  const text = byId("disconnected-text");
  let lostAt = 0;
  let retryAt = 0;
  const draw = () => {
    banner.hidden = !lostAt || Date.now() - lostAt < QUIET_MS;
    const seconds = Math.max(Math.ceil((retryAt - Date.now()) / 1000), 0);
    setText(text, seconds ? `Live connection lost. Training goes on and nothing is missed; trying again in ${seconds} s.` : "Live connection lost. Reconnecting…");
  };
  byId("retry").addEventListener("click", () => socket.retryNow());
  setInterval(() => lostAt && draw(), 500);
  return (status) => {
    if (status.kind === "open") lostAt = 0;
    else if (status.kind === "closed") {
      lostAt ||= Date.now();
      retryAt = status.retryAt;
    }
    document.documentElement.dataset.live = status.kind;
    draw();
  };
}
