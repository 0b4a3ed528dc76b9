import { expect, test } from "vitest";
import { ApiError } from "../src/data/api";
import { age, bytes, compact, duration, metric, percent } from "../src/data/format";
import { getPath, pathOf, setPath, type PlainObject } from "../src/data/paths";
import { ema } from "../src/data/smooth";

test("numbers as people read them", () => {
  expect([compact(46_702_792_704), compact(1_000_000), compact(999_600), compact(12), compact(null)]).toEqual(["46.7B", "1M", "1M", "12", "–"]);
  expect([metric(2.34567), metric(0.00001), metric(0), metric(3), metric(NaN), metric(12345.6)]).toEqual(["2.346", "1.00e-5", "0", "3", "–", "12.3k"]);
  expect([duration(0.42), duration(59), duration(3725), duration(90_000)]).toEqual(["0.4 s", "59 s", "1 h 2 min", "1 d 1 h"]);
  expect([bytes(999), bytes(50_331_648), percent(0.1234)]).toEqual(["999 B", "50.3 MB", "12.3 %"]);
  expect(age(1000, 65_000)).toBe("1 min ago");
});

test("paths and pointers into a spec", () => {
  const spec: PlainObject = { model: { moe: { balance: [{ kind: "z_loss", coefficient: 1 }] } } };
  expect(getPath(spec, "model.moe.balance.0.coefficient")).toBe(1);
  expect(getPath(spec, "model.nothing.here")).toBeUndefined();
  setPath(spec, "data.seq_len", 256);
  expect(getPath(spec, "data.seq_len")).toBe(256);
  expect(pathOf("/spec/model/moe/balance/0/coefficient")).toBe("model.moe.balance.0.coefficient");
  expect(pathOf("/spec/a~1b")).toBe("a/b");
});

test("smoothing starts at the first value and passes over unknown ones", () => {
  expect([...ema(Float64Array.from([4, 4, NaN, 4]), 0.9)].map((v) => Number(v.toFixed(9)))).toEqual([4, 4, 4, 4]);
});

test("a problem whose detail is its title says it once", () => {
  expect(new ApiError({ title: "Not found", status: 404, detail: "Not found" }).message).toBe("Not found");
  expect(new ApiError({ title: "Not found", status: 404, detail: "no run 7" }).message).toBe("Not found: no run 7");
  expect(new ApiError({ title: "Not found", status: 404 }).message).toBe("Not found");
});
