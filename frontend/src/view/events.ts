/** What happened: spikes (which open to what the router did), validations, checkpoints, starts and ends. Newest first. */
import { age, bytes, duration, metric, percent, whole } from "../data/format";
import { spikesOf, worstLayer, type Spike } from "../data/marks";
import type { RunStore } from "../data/store";
import type { RunEvent } from "../data/types";
import { byId, el, setText } from "./dom";
import { throttled } from "./frame";
import { spikeText } from "./loss";

const MAX_SHOWN = 300;

export function initEvents(store: RunStore): void {
  const list = byId("events");
  const only = byId<HTMLSelectElement>("events-kind");
  const nodes = new Map<RunEvent, HTMLElement>();
  const draw = throttled(300, () => {
    const kind = only.value;
    const shown = store.events.filter((event) => !kind || event.kind === kind).slice(-MAX_SHOWN).reverse();
    for (const event of shown) if (!nodes.has(event)) nodes.set(event, eventItem(store, event));
    list.replaceChildren(...shown.map((event) => nodes.get(event)!));
    byId("events-empty").hidden = shown.length > 0;
    setText(byId("events-count"), store.events.length ? String(store.events.length) : "");
  });
  store.on("events", draw);
  only.addEventListener("change", draw);
  draw();
}

function eventItem(store: RunStore, event: RunEvent): HTMLElement {
  const [title, text] = WORDS[event.kind]?.(event.body) ?? [event.kind.replaceAll("_", " "), ""];
  const time = new Date(event.at);
  const step = event.step ? stepButton(store, event.step) : el("span", { className: "step-none" });
  const head: HTMLElement[] = [
    el("span", { className: "event-title" }, title),
    el("span", { className: "event-text" }, text),
    el("time", { dateTime: event.at, "data-age": "", title: time.toLocaleString() }, age(time)),
  ];
  const item = el("li", { className: "event", "data-kind": event.kind }, step);
  const [spike] = spikesOf([event]);
  if (spike) item.append(el("details", {}, el("summary", {}, ...head), spikeTable(store, spike)));
  else item.append(...head);
  return item;
}

function stepButton(store: RunStore, step: number): HTMLElement {
  const button = el("button", { type: "button", className: "step-link", title: "Show this step in every picture" }, whole(step));
  button.addEventListener("click", () => store.setStep(step));
  return button;
}

const number = (value: unknown): number => (typeof value === "number" ? value : NaN);

/** How far a sequence's logits depend on what shares its batch; rounding is no dependence. */
const dependence = (share: unknown): string[] => (typeof share !== "number" ? [] : [share < 1e-4 ? "does not depend on the batch" : `logits differ by ${percent(share)} with the batch's other sequences`]);

const WORDS: Record<string, (body: RunEvent["body"]) => [string, string]> = {
  run_started: (e) => [e.resumed_from_step ? "Resumed" : "Started", e.resumed_from_step ? `from step ${whole(number(e.resumed_from_step))}` : `on ${(e.devices as string[] | undefined)?.join(", ") || "its device"}`],
  eval_done: (e) => ["Validation", [`loss ${metric(number(e.loss))}`, ...(typeof e.bits_per_byte === "number" ? [`${metric(e.bits_per_byte)} bits per byte`] : []), ...dependence(e.batch_dependence), ...Object.entries((e.by_domain as Record<string, number>) ?? {}).map(([domain, loss]) => `${domain} ${metric(loss)}`)].join(" · ")],
  checkpoint_saved: (e) => ["Checkpoint", `${bytes(number(e.size_bytes))} in ${duration(number(e.seconds))}`],
  spike_detected: (e) => ["Loss spike", spikeSummary(e as unknown as Spike)],
  run_ended: (e) => ["Ended", [e.outcome, e.reason, e.detail].filter(Boolean).join(": ")],
};

function spikeSummary(spike: Spike): string {
  const worst = worstLayer(spike);
  const router = worst ? `; layer ${worst.layer}: MaxVio ${metric(worst.max_vio_before)} → ${metric(worst.max_vio)}` : "";
  return spikeText(spike.loss, spike.median, spike.score) + router;
}

function spikeTable(store: RunStore, spike: Spike): HTMLElement {
  const head = ["layer", "MaxVio before", "MaxVio", "dead", "top expert", "its share", "entropy"];
  const rows = spike.router.map((layer) => {
    const show = el("button", { type: "button", className: "step-link" }, String(layer.layer));
    show.addEventListener("click", () => {
      store.setStep(spike.step);
      store.setLayer(Math.max(store.run.moe_layers.indexOf(layer.layer), 0));
      store.setExpert(layer.top_expert);
    });
    const cells = [metric(layer.max_vio_before), metric(layer.max_vio), String(layer.dead), String(layer.top_expert), percent(layer.top_share), metric(layer.entropy)];
    return el("tr", {}, el("td", {}, show), ...cells.map((text) => el("td", {}, text)));
  });
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, ...rows));
  return el("div", { className: "behind-table", tabIndex: 0, role: "region", "aria-label": `The router at the spike of step ${spike.step}` }, table);
}
