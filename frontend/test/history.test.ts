import { afterEach, expect, test, vi } from "vitest";
import { History } from "../src/data/history";
import { RunStore } from "../src/data/store";
import type { Run } from "../src/data/types";
import { fixture, rows } from "./blocks";

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

test("a dense run's rows are fetched for its phases", async () => {
  const asked = stubbed();
  await new History(storeOf({ moe_layers: [], experts: 0 })).snapshot();
  expect(asked[0].get("tensors")).toContain("phase_ms");
});
