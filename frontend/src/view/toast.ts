/** A word to the reader about what just happened; failures stay until they are closed. */
import { ApiError } from "../data/api";
import { byId, el } from "./dom";

const SHOWN_MS = 5000;

export function toast(text: string, bad = false): void {
  // The same word twice helps nobody.
  if ([...byId("toasts").children].some((shown) => shown.firstElementChild?.textContent === text)) return;
  const close = el("button", { type: "button", className: "icon small", "aria-label": "Close" }, "×");
  const box = el("div", { className: bad ? "toast bad" : "toast", role: bad ? "alert" : "status" }, el("span", {}, text), close);
  close.addEventListener("click", () => box.remove());
  byId("toasts").append(box);
  if (!bad) setTimeout(() => box.remove(), SHOWN_MS);
}

/** Tells of a failed call, unless it was given up on purpose. */
export function tellError(error: unknown): void {
  if ((error as Error)?.name === "AbortError") return;
  if (!(error instanceof ApiError)) console.error(error);
  const { message } = error as Error;
  const fields = error instanceof ApiError ? (error.problem.errors ?? []).map(({ detail }) => detail).filter((detail) => !message.includes(detail)) : [];
  toast([message, ...fields].join(" · "), true);
}
