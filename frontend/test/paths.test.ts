import { expect, test } from "vitest";
import { inOrderOf, type Plain } from "../src/data/paths";

test("what the form gives comes in the order that the spec had, and what is new behind", () => {
  const before: Plain = { name: "a", model: { d: 1, moe: null }, balance: [{ kind: "bias", u: 1 }, { kind: "aux" }] };
  const read: { [key: string]: Plain } = { balance: [{ kind: "z" }, { kind: "aux" }, { kind: "bias", u: 2 }], fresh: 1, model: { moe: null, x: 3, d: 2 }, name: "b" };
  const ordered = inOrderOf(read, before);
  expect(ordered).toEqual({ ...read, balance: [{ kind: "bias", u: 2 }, { kind: "aux" }, { kind: "z" }] });
  expect(JSON.stringify(ordered)).toBe('{"name":"b","model":{"d":2,"moe":null,"x":3},"balance":[{"kind":"bias","u":2},{"kind":"aux"},{"kind":"z"}],"fresh":1}');
  expect(inOrderOf(["b", "a"], ["a", "b"])).toEqual(["b", "a"]);
});
