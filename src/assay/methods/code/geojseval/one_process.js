"use strict";
/* One case in one process: node runner.js job.json. The answer is the last line of stdout. */

const fs = require("fs");
const path = require("path");
const vm = require("vm");
const { createRequire } = require("module");

const job = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const write = fs.writeSync;
const quoted = JSON.stringify;

function tell(found) {
  write(1, `\n${quoted(found)}`);
  process.exit(0);
}

const failed = (error) => {
  const told = error instanceof Error ? `${error.name}: ${error.message}` : `thrown ${typeof error}: ${error}`;
  tell({ state: "raised", error: told });
};

function given(value) {
  if (Array.isArray(value)) return value.map(given);
  if (value === null || typeof value !== "object") return value;
  if (Object.keys(value).join() === "__js__") return vm.runInThisContext(`(${value.__js__}\n)`);
  return Object.fromEntries(Object.entries(value).map(([key, held]) => [key, given(held)]));
}

async function main() {
  const home = job.folder === null ? process.cwd() : path.dirname(job.folder);
  globalThis.require = createRequire(path.join(home, "program.js"));
  globalThis.module = { exports: {} };
  globalThis.exports = globalThis.module.exports;
  for (const name of job.modules) globalThis.require(name);
  vm.runInThisContext(job.program, { filename: "program.js" });
  const found = vm.runInThisContext(`typeof ${job.entry} === "undefined" ? module.exports.${job.entry} : ${job.entry}`);
  if (typeof found !== "function") throw new ReferenceError(`the program defines no function '${job.entry}'`);
  const value = await found(...given(job.arguments));
  tell(value === undefined ? { state: "returned" } : { state: "returned", value });
}

process.on("uncaughtException", failed);
process.on("unhandledRejection", failed);
main().catch(failed);
