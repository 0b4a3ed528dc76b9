/** Rows as CSV (RFC 4180), numbers at full precision: what a spreadsheet or a script reads. */

export type Value = string | number | null;

export interface Table {
  head: string[];
  rows: Value[][];
}

/** A text that no spreadsheet takes for a formula: names of metrics and phases are the trainer's own. */
const plain = (text: string): string => (/^[=+\-@\t\r]/.test(text) ? `'${text}` : text);

const quoted = (text: string): string => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

/** The shortest text that reads back as the same number, as a float32 where it is one; empty where there is none. */
function digits(value: number): string {
  if (!Number.isFinite(value)) return "";
  if (Math.fround(value) !== value || Number.isInteger(value)) return String(value);
  for (let precision = 6; precision < 9; precision++) if (Math.fround(Number(value.toPrecision(precision))) === value) return String(Number(value.toPrecision(precision)));
  return String(Number(value.toPrecision(9)));
}

const cell = (value: Value): string => (value === null ? "" : typeof value === "number" ? digits(value) : quoted(plain(value)));

export const csvOf = ({ head, rows }: Table): string => [head, ...rows].map((row) => `${row.map(cell).join(",")}\r\n`).join("");
