import { expect, test } from "vitest";
import { planFetch } from "../src/data/plan";
import { Series } from "../src/data/series";
import { backoff } from "../src/data/socket";
import { RunStore } from "../src/data/store";
import type { Run, RunEvent } from "../src/data/types";
import { spikesOf, valPoints, worstLayer } from "../src/data/marks";
import { rows } from "./blocks";

const run = (over: Partial<Run> = {}): Run => ({ id: 1, attempt: 1, resumed_from_step: null, state: "running", metric_names: [], moe_layers: [0], experts: 2, ...over }) as Run;
const event = (id: number, kind: string, step: number, body: Record<string, unknown> = {}): RunEvent => ({ id, kind, step, attempt: 1, at: "2026-01-01T00:00:00Z", body });

test("follows the newest step until the reader chooses one", () => {
  const store = new RunStore(run());
  store.applySteps(rows([1, 2], [1, 1]));
  expect(store.step).toBe(2);
  store.setStep(1);
  store.applySteps(rows([3], [1]));
  expect([store.step, store.lastStep]).toEqual([1, 3]);
  store.setStep(99);
  expect(store.step).toBe(3);
});

test("history and live rows reach the same state in either way round", () => {
  const history = new RunStore(run());
  history.applySteps(rows([1, 2, 3], [3, 2, 1]), false);
  const live = new RunStore(run());
  for (const step of [1, 2, 3]) live.applySteps(rows([step], [4 - step]));
  expect([...live.whole.view("loss")!.mean]).toEqual([...history.whole.view("loss")!.mean]);
});

test("an attempt that goes on from a checkpoint makes the page forget what lies behind it", () => {
  const store = new RunStore(run());
  const said: string[] = [];
  store.on("reload", () => said.push("reload"));
  store.applySteps(rows([1, 2, 3], [3, 2, 1]));
  store.applyRun(run({ attempt: 2, resumed_from_step: 3 }));
  expect(said).toEqual([]);
  store.applyRun(run({ attempt: 3, resumed_from_step: 1 }));
  expect(said).toEqual(["reload"]);
});

test("an event counts once, and events stay in their order", () => {
  const store = new RunStore(run());
  store.applyEvents([event(2, "eval_done", 20, { loss: 1.5 }), event(1, "eval_done", 10, { loss: 2 })]);
  store.applyEvents([event(2, "eval_done", 20, { loss: 1.5 })]);
  expect(valPoints(store.events).map(({ step, loss }) => [step, loss])).toEqual([[10, 2], [20, 1.5]]);
});

test("a spike names the layer whose router changed most", () => {
  const router = [
    { layer: 0, max_vio: 2, max_vio_before: 1.9 },
    { layer: 3, max_vio: 1.5, max_vio_before: 0.2 },
  ];
  const [spike] = spikesOf([event(1, "spike_detected", 40, { loss: 5, router }), event(2, "eval_done", 40)]);
  expect([spike.step, worstLayer(spike)?.layer]).toEqual([40, 3]);
});

test("a long run is made coarser instead of growing without end", () => {
  const store = new RunStore(run());
  for (let start = 1; start <= 12_000; start += 1000) {
    const steps = Array.from({ length: 1000 }, (_, i) => start + i);
    store.applySteps(rows(steps, steps.map(() => 2)));
  }
  expect(store.whole.level).toBe(64);
  expect(store.whole.length).toBeLessThan(10_000);
  expect(store.whole.n.subarray(0, store.whole.length).reduce((sum, n) => sum + n, 0)).toBe(12_000);
});

test("a fetch is planned in pieces that the server answers at one level, cut where buckets begin", () => {
  expect(planFetch(1, 2000, 4)).toEqual({ level: 1, pieces: [{ from: 1, to: 2000 }] });
  expect(planFetch(1, 5000, 4).pieces).toHaveLength(3);
  const million = planFetch(1, 1_000_000, 4);
  expect([million.level, million.pieces.length]).toEqual([1024, 1]);
  const zoom = planFetch(100_001, 200_000, 4);
  expect(zoom.level).toBe(64);
  for (const [i, piece] of zoom.pieces.entries()) if (i) expect((piece.from - 1) % zoom.level).toBe(0);
  expect(zoom.pieces[0].from).toBe(100_001);
  expect(planFetch(5, 4, 4).pieces).toEqual([]);
});

test("reconnects soon at first, and never later than every 15 s", () => {
  expect(backoff(0, 0)).toBe(500);
  expect(backoff(0, 1)).toBe(250);
  expect(backoff(30, 0)).toBe(15_000);
});

test("figures at a step that a zoom does not show come from the whole run", () => {
  const store = new RunStore(run());
  store.applySteps(rows([1, 2, 3, 4], [4, 3, 2, 1]));
  store.setRange({ from: 3, to: 4 });
  store.zoomed = new Series();
  for (const [step, series] of [[2, store.whole], [3, store.zoomed], [4, store.zoomed]] as const) {
    store.setStep(step);
    expect(store.seriesAtStep).toBe(series);
  }
});
