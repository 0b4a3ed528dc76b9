import { afterEach, expect, test, vi } from "vitest";
import { History } from "../src/data/history";
import { Series } from "../src/data/series";
import { RunStore } from "../src/data/store";
import type { Run } from "../src/data/types";
import { fixture, rows, stepsBlock } from "./blocks";

afterEach(() => vi.unstubAllGlobals());

/** Answers every request with the same block and remembers what was asked. */
function stubbed(): URLSearchParams[] {
  const asked: URLSearchParams[] = [];
  vi.stubGlobal("document", { cookie: "" });
  vi.stubGlobal("fetch", async (path: string) => {
    asked.push(new URL(path, "http://x").searchParams);
    return new Response(fixture("steps.bin"));
  });
  return asked;
}

const storeOf = (fields: Partial<Run>, expertRanks = 1): RunStore => {
  const store = new RunStore({ id: 1, attempt: 1, metric_names: [], experts: 4, device_names: [], ...fields } as unknown as Run, 10, expertRanks);
  store.applySteps(rows([1000], [1]), false);
  return store;
};

test("a layer is asked for by its row, whatever its index in the model: the first layers may be dense", async () => {
  const asked = stubbed();
  const store = storeOf({ moe_layers: [3, 5, 7], balance_terms: ["z_loss"] });
  store.setLayer(2);
  await Promise.all([new History(store).layer(), new History(store).terms()]);
  expect(asked.map((query) => [query.get("tensors"), query.get("layer")])).toEqual(expect.arrayContaining([["expert_tokens", "2"], ["balance_loss", "2"]]));
  expect(new Set(asked.map((query) => query.get("layer")))).toEqual(new Set(["2"]));
});

test("the rows around the cursor: as many for copies of the model on many devices as on one, fewer where ranks share the experts", async () => {
  const asked = stubbed();
  const devices = { device_names: new Array<string>(64).fill("GPU"), moe_layers: [0, 1, 2, 3], experts: 64 };
  for (const ranks of [1, 64]) await new History(storeOf(devices, ranks)).snapshot();
  const [copies, shared] = asked.map((query) => Number(query.get("to")) - Number(query.get("from")));
  expect([copies, shared]).toEqual([100, 6]);
});

/** A server that has told the steps `told` of one layer of two experts, at any level; it remembers what was asked. */
function rarely(told: number[]): [number, number][] {
  const asked: [number, number][] = [];
  vi.stubGlobal("document", { cookie: "" });
  vi.stubGlobal("fetch", async (path: string) => {
    const query = new URL(path, "http://x").searchParams;
    const [from, to] = [Number(query.get("from")), Number(query.get("to"))];
    asked.push([from, to]);
    const steps = told.filter((step) => step >= from && step <= to);
    const tensors = query.get("tensors") ? { expert_tokens: steps.map((step) => [step, 1]) } : {};
    return new Response(stepsBlock(steps, steps.map((step) => step / 100), tensors));
  });
  return asked;
}

const TOLD = [500, 1000, 1500, 2000, 9500, 10_000];
const rareStore = (level: number): RunStore => {
  const store = new RunStore({ id: 1, attempt: 1, metric_names: [], experts: 2, moe_layers: [0], device_names: [] } as unknown as Run, 10, 1, 500);
  store.whole = new Series(level);
  store.applySteps(rows(TOLD, TOLD.map((step) => step / 100)), false);
  return store;
};

test.each([1, 1024])("a step that was not told shows the last that was, or else the first, with the whole run in rows of %i steps", async (level) => {
  for (const [step, shown] of [[700, 500], [999, 500], [1000, 1000], [6000, 2000], [60, 500]]) {
    const asked = rarely(TOLD);
    const store = rareStore(level);
    store.setStep(step);
    await new History(store).snapshot();
    expect([store.snapshots.at(step)?.step, store.snapshots.told(step, "expert_tokens")?.tensors.expert_tokens?.[0]]).toEqual([shown, shown]);
    expect(asked.length).toBeLessThan(4);
    expect(store.snapshots.holds(step)).toBe(true);
  }
});

test("a zoom between two told steps reaches out to both, so that its lines lead somewhere", async () => {
  rarely(TOLD);
  const store = rareStore(1024);
  store.setRange({ from: 1100, to: 1300 });
  await new History(store).zoom();
  expect([...store.series.step.subarray(0, store.series.length)]).toEqual([1000, 1500, 2000]);
  await new History(store).layer();
  expect(store.layerHistory!.length).toBe(3);
});

test.each([1, null, 2])("a zoom of a long run is as fine as without its neighbours, where %s step apart is told", async (every) => {
  const asked = rarely([]);
  const store = new RunStore({ id: 1, attempt: 1, metric_names: [], experts: 2, moe_layers: [0], device_names: [] } as unknown as Run, 10, 1, every);
  store.whole = new Series(1024);
  const ends = Array.from({ length: 1000 }, (_, i) => (i + 1) * 1024);
  store.applySteps(rows(ends, ends, { level: 1024, n: ends.map(() => 1024 / (every ?? 1)) }), false);
  store.setRange({ from: 500_001, to: 503_000 });
  const history = new History(store);
  await history.zoom();
  await history.layer();
  expect([store.series.level, store.layerHistory!.level]).toEqual([1, 1]);
  if (every === 1) expect(asked).toEqual([[500_001, 502_000], [502_001, 503_000], [500_001, 502_000], [502_001, 503_000]]);
});

test("a dense run's rows are fetched for its phases", async () => {
  const asked = stubbed();
  await new History(storeOf({ moe_layers: [], experts: 0 })).snapshot();
  expect(asked[0].get("tensors")).toContain("phase_ms");
});
