/** Runs over one another: one metric at a time, by step. */
import "uplot/dist/uPlot.min.css";
import { getBlock } from "../data/api";
import { planFetch } from "../data/plan";
import { Series } from "../data/series";
import { decodeSteps } from "../data/steps";
import type { Run } from "../data/types";
import { Overlay, type Curve } from "../view/overlay";
import { byId, el, pageData } from "../view/dom";
import { tellError } from "../view/toast";

const PIECES = 2;
const runs = pageData<Run[]>("compare-data");

async function load(run: Run): Promise<Series> {
  const plan = planFetch(1, Math.max(run.last_step, 1), PIECES);
  const series = new Series(plan.level);
  for (const { from, to } of plan.pieces) series.apply(decodeSteps(await getBlock(`/runs/${run.id}/steps?from=${from}&to=${to}&points=2000&scalars=*&tensors=`)));
  return series;
}

async function start(): Promise<void> {
  const select = byId<HTMLSelectElement>("metric");
  const log = byId<HTMLInputElement>("compare-log");
  const names = [...new Set(runs.flatMap((run) => run.metric_names))];
  select.append(...names.map((name) => el("option", { value: name }, name)));
  select.value = names.includes("lm_loss") ? "lm_loss" : (names[0] ?? "");
  const all = await Promise.all(runs.map(load));
  const hidden = new Set<number>();
  const curves = (): Curve[] =>
    runs.map((run, i) => ({ label: `#${run.id} ${run.name}`, colour: `--line-${(i % 6) + 1}`, series: all[i], hidden: hidden.has(i) }));
  const overlay = new Overlay(byId("overlay"), () => ({ metric: select.value, log: log.checked, curves: curves() }));
  for (const control of [select, log]) control.addEventListener("change", () => overlay.redraw());
  byId("legend").append(
    ...runs.map((run, i) => {
      const box = el("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => {
        if (box.checked) hidden.delete(i);
        else hidden.add(i);
        overlay.redraw();
      });
      const swatch = el("span", { className: `swatch swatch-${(i % 6) + 1}`, "aria-hidden": "true" });
      return el("label", {}, box, swatch, el("a", { href: `/runs/${run.id}` }, `#${run.id} ${run.name}`));
    }),
  );
  overlay.redraw();
}

if (runs.length > 1) start().catch(tellError);
