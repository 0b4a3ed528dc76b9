/** The list of runs: live rows, and what can be done to several at once. */
import { initBulk } from "../view/bulk";
import { initListKeys } from "../view/list-keys";
import { initRows } from "../view/rows";

initRows();
initBulk();
initListKeys();
