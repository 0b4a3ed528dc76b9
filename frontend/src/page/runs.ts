/** The list of runs: live rows, and what can be done to several at once. */
import { initBulk } from "../view/bulk";
import { initRows } from "../view/rows";

initRows();
initBulk();
