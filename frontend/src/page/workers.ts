/** Releasing the names of workers. */
import htmx from "htmx.org";
import { change } from "../data/api";
import { isSure } from "../view/sure";
import { tellError, toast } from "../view/toast";

const refresh = (): Promise<void> => htmx.ajax("get", location.pathname, { target: "#workers", select: "#workers", swap: "outerHTML" });

document.addEventListener("click", (event) => {
  const button = (event.target as Element).closest<HTMLButtonElement>("[data-release]");
  if (!button || !isSure(button, "Really release?", event)) return;
  change("POST", `/workers/${button.dataset.release}/release`).then(() => {
    toast("Released: whoever says this name next holds it");
    return refresh();
  }, tellError);
});

// The table comes anew every few seconds; not while it waits for an answer.
document.addEventListener("htmx:beforeSwap", (event) => {
  if (document.querySelector("#workers [data-sure]")) (event as CustomEvent<{ shouldSwap: boolean }>).detail.shouldSwap = false;
});
