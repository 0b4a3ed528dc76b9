import { expect, test } from "vitest";
import { csvOf } from "../src/data/csv";

test("what has commas, quotes or line breaks is quoted, and what nobody knows is left empty", () => {
  expect(csvOf({ head: ["step", 'the "loss", smoothed'], rows: [[1, NaN], [2, null], [3, "a\nb"]] })).toBe('step,"the ""loss"", smoothed"\r\n1,\r\n2,\r\n3,"a\nb"\r\n');
});

test("a name that a spreadsheet would take for a formula is text, and a negative number stays one", () => {
  const head = ['=HYPERLINK("http://x")', "@SUM(1)", "+1", "-1", "\tx", "a=b"];
  expect(csvOf({ head, rows: [[-0.5, "=1", null, 0, 0, 0]] })).toBe(`"'=HYPERLINK(""http://x"")",'@SUM(1),'+1,'-1,'\tx,a=b\r\n-0.5,'=1,,0,0,0\r\n`);
});

test("numbers read back as they were, without digits that a float32 does not have", () => {
  const numbers = [0.1, 1 / 3, 5.490643, 1e-30, 123456.7, 16777217, 3.4e38].map(Math.fround);
  const text = csvOf({ head: ["x"], rows: numbers.map((value) => [value]) }).split("\r\n").slice(1, -1);
  expect(text.map((one) => Math.fround(Number(one)))).toEqual(numbers);
  expect(text[0]).toBe("0.1");
  expect(csvOf({ head: ["x"], rows: [[0.1]] })).toBe("x\r\n0.1\r\n");
});
