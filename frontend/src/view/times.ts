/** Keeps "3 min ago" true, and shows the exact time on hover. */
import { age } from "../data/format";
import { all, setText } from "./dom";

export function initTimes(): void {
  const draw = () => {
    for (const node of all<HTMLTimeElement>("time[data-age]")) {
      setText(node, age(node.dateTime));
      node.title ||= new Date(node.dateTime).toLocaleString();
    }
  };
  draw();
  setInterval(draw, 15_000);
  document.addEventListener("htmx:afterSettle", draw);
}
