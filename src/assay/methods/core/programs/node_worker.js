"use strict";
/* What runs inside of the sandbox: a warm Node that calls a function of one program, again and again. Built-in modules
only.

Every run has a realm of its own: a fresh context with its own Array, Object and Math, in which the libraries and the
program are evaluated anew. What they compile to is kept, so that only the first run reads and compiles. Nothing that a
program makes is there in the next run. What all runs share is Node itself (process, console, fs and the rest): `spoilt`
looks at it between runs, by a list of what it was.

A run goes in steps that the other side of the border starts and times: R (a realm and the arguments are ready; it says
whether the last run left something behind), A (the program is loaded, arguments that are expressions are evaluated), D
(done), V (value), or E (the program raised), F (its answer is too long). Every message carries the number of its job.
*/

const fs = require("fs");
const path = require("path");
const v8 = require("v8");
const vm = require("vm");
const { spawnSync } = require("child_process");
const { createRequire, isBuiltin } = require("module");
const { types } = require("util");

const HEAD = 21; // four bytes of length, sixteen of the job's number, one of the kind
const FROM = 3;
const TO = 4;
const DEEPEST = 200;
const TOLD = 500;
const GARBAGE = 8 * 2 ** 20; // bytes
const GIVEN = [
  "AbortController", "AbortSignal", "Blob", "Buffer", "DOMException", "Event", "EventTarget", "MessageChannel",
  "TextDecoder", "TextEncoder", "URL", "URLSearchParams", "atob", "btoa", "clearImmediate", "clearInterval",
  "clearTimeout", "console", "crypto", "performance", "process", "queueMicrotask", "setImmediate", "setInterval",
  "setTimeout", "structuredClone",
];
/* What Node adds to the language. */

const { ownKeys, getOwnPropertyDescriptor, getPrototypeOf, apply, defineProperty } = Reflect;
const { is, hasOwn, keys: keysOf } = Object;
const { isArray } = Array;
const { isFinite } = Number;
const { parse, stringify: quoted } = JSON;
const { exit } = process;
const later = setImmediate;
const then = Promise.prototype.then;
const timeOf = Date.prototype.getTime;
const eachOfMap = Map.prototype.forEach;
const eachOfSet = Set.prototype.forEach;
const tagOf = Object.prototype.toString;
const Typed = getPrototypeOf(Uint8Array.prototype);
const [kindOfTyped, bufferOf, offsetOf, lengthOf] = [Symbol.toStringTag, "buffer", "byteOffset", "byteLength"].map(
  (name) => getOwnPropertyDescriptor(Typed, name).get,
);
const given = {};
for (const name of GIVEN) {
  given[name] = globalThis[name];
}

const [folder, names] = parse(process.argv[2]);
const HOME = path.join(folder === null ? "/scratch" : path.dirname(folder), "program.js");

/* ---- messages ---- */

function exactly(length) {
  const found = Buffer.allocUnsafe(length);
  let at = 0;
  while (at < length) {
    const part = fs.readSync(FROM, found, at, length - at, null);
    if (part === 0) {
      exit(0); // who asks is gone
    }
    at += part;
  }
  return found;
}

function receive() {
  const head = exactly(HEAD);
  return { mark: head.subarray(4, 20), text: exactly(head.readUInt32LE(0)).toString("utf8") };
}

function send(mark, kind, text = "") {
  const body = Buffer.from(text, "utf8");
  const whole = Buffer.alloc(HEAD + body.length);
  whole.writeUInt32LE(body.length, 0);
  mark.copy(whole, 4);
  whole.write(kind, 20, "latin1");
  body.copy(whole, HEAD);
  for (let at = 0; at < whole.length; ) {
    at += fs.writeSync(TO, whole, at, whole.length - at);
  }
}

/* ---- realms ---- */

const INNER = new vm.Script(
  `(function (bytes) {
  "use strict";
  const { parse } = JSON, { isArray } = Array, { defineProperty } = Object, from = Uint8Array.from.bind(Uint8Array);
  const Big = BigInt, Day = Date, Dictionary = Map, Collection = Set, number = Number;
  const typed = {
    Int8Array, Uint8Array, Uint8ClampedArray, Int16Array, Uint16Array, Int32Array, Uint32Array, Float32Array,
    Float64Array, BigInt64Array, BigUint64Array,
  };
  const put = (whole, key, value) => {
    defineProperty(whole, key, { __proto__: null, value, writable: true, enumerable: true, configurable: true });
  };
  function part(whole, key, found, open) {
    if (typeof found !== "object" || found === null || !("j" in found)) return revived(found, open);
    open[open.length] = [whole, key, found.j];
    return undefined; // until it is evaluated
  }
  function revived(found, open) {
    if (typeof found !== "object" || found === null) return found;
    if (isArray(found)) {
      for (let n = 0; n < found.length; n++) {
        if (typeof found[n] === "object") found[n] = part(found, n, found[n], open);
      }
      return found;
    }
    if ("o" in found) {
      const made = {};
      for (let n = 0; n < found.o.length; n++) {
        const key = found.o[n][0], value = part(made, key, found.o[n][1], open);
        if (key !== "__proto__") made[key] = value;
        else put(made, key, value);
      }
      return made;
    }
    if ("u" in found) return undefined;
    if ("f" in found) return number(found.f);
    if ("i" in found) return found.i[0] === "-" ? -Big(found.i.slice(1)) : Big(found.i);
    if ("D" in found) return new Day(found.D === null ? NaN : found.D);
    if ("m" in found) return new Dictionary(revived(found.m, open));
    if ("s" in found) return new Collection(revived(found.s, open));
    return new typed[found.y[0]](from(bytes(found.y[1])).buffer);
  }
  const read = (text) => {
    const open = [];
    return { open, values: revived(parse(text), open) };
  };
  return { parse, put, read, module: () => ({ exports: {} }) };
})`,
  { filename: "inner.js" },
);

const scripts = new Map();
const places = new Map();

/* A file of a library, compiled once for all realms. */
function compiled(file) {
  if (!scripts.has(file)) {
    const text = fs.readFileSync(file, "utf8").replace(/^\uFEFF/, "").replace(/^#!.*/, "");
    const whole = `(function (exports, require, module, __filename, __dirname) { ${text}\n})`;
    scripts.set(file, new vm.Script(whole, { filename: file }));
  }
  return scripts.get(file);
}

function resolved(from, request) {
  const key = `${from}\0${request}`;
  if (!places.has(key)) {
    places.set(key, createRequire(from).resolve(request));
  }
  return places.get(key);
}

function requirer(realm, from) {
  const require_ = (request) => {
    if (typeof request === "string" && isBuiltin(request)) {
      const found = require(request);
      watch(found, true);
      return found;
    }
    return loaded(realm, resolved(from, request)).exports;
  };
  require_.resolve = (request) => resolved(from, request);
  require_.cache = realm.cache;
  require_.main = realm.module;
  return require_;
}

/* A library's file, evaluated in a realm the first time that it is asked for there. */
function loaded(realm, file) {
  if (file in realm.cache) {
    return realm.cache[file];
  }
  const module_ = realm.inner.module();
  realm.cache[file] = module_;
  try {
    module_.id = module_.filename = file;
    if (file.endsWith(".json")) {
      module_.exports = realm.inner.parse(fs.readFileSync(file, "utf8"));
    } else if (file.endsWith(".node")) {
      module_.exports = require(file);
    } else {
      const around = compiled(file).runInContext(realm.global);
      apply(around, module_.exports, [module_.exports, requirer(realm, file), module_, file, path.dirname(file)]);
    }
    module_.loaded = true;
  } catch (error) {
    delete realm.cache[file];
    throw error;
  }
  return module_;
}

function newRealm() {
  const global_ = vm.createContext(vm.constants.DONT_CONTEXTIFY);
  const inner = INNER.runInContext(global_)((data) => Buffer.from(data, "base64"));
  const realm = { global: global_, cache: Object.create(null), inner, module: null };
  realm.module = realm.inner.module();
  realm.module.id = ".";
  const own = {
    ...given, global: global_, module: realm.module, exports: realm.module.exports, require: requirer(realm, HOME),
    __filename: HOME, __dirname: path.dirname(HOME),
  };
  for (const name of keysOf(own)) {
    defineProperty(global_, name, { value: own[name], writable: true, configurable: true, enumerable: false });
  }
  for (const name of names) {
    realm.global.require(name);
  }
  return realm;
}

let known = { source: null, script: null };

/* The function of that name, and what it is called on. */
function entryOf(realm, source, entry) {
  const [first, ...rest] = entry.split(".");
  const before = realm.global[first];
  if (known.source !== source) {
    known = { source, script: new vm.Script(source, { filename: "program.js" }) };
  }
  known.script.runInContext(realm.global);
  let self;
  let found = new vm.Script(`typeof ${first} === "undefined" ? undefined : ${first}`).runInContext(realm.global);
  if (found === undefined || found === before) {
    const { exports } = realm.module;
    found = undefined;
    if (typeof exports === "function" && exports.name === first) {
      found = exports;
    } else if (exports !== null && exports !== undefined && hasOwn(exports, first)) {
      found = exports[first];
    }
  }
  for (const name of rest) {
    self = found;
    found = found === null || found === undefined ? undefined : found[name];
  }
  if (typeof found !== "function") {
    throw new ReferenceError(`the program defines no function '${entry}'`);
  }
  return { self, found };
}

/* ---- what all realms share, and whether it is as it was ---- */

const watched = [];
const seen = new Set();

function watch(object, below = false) {
  if (object === null || (typeof object !== "object" && typeof object !== "function")) {
    return;
  }
  if (!seen.has(object)) {
    seen.add(object);
    const keys = ownKeys(object);
    const was = keys.map((key) => ({ key, ...getOwnPropertyDescriptor(object, key) }));
    watched.push({ object, was, above: getPrototypeOf(object) });
  }
  if (below) {
    for (const key of ownKeys(object)) {
      const value = getOwnPropertyDescriptor(object, key)?.value;
      if (typeof value === "function" || (typeof value === "object" && value !== null)) {
        watch(value);
        watch(getOwnPropertyDescriptor(value, "prototype")?.value);
      }
    }
  }
}

function changed() {
  for (let n = 0; n < watched.length; n++) {
    const { object, was, above } = watched[n];
    if (getPrototypeOf(object) !== above || ownKeys(object).length !== was.length) {
      return true;
    }
    for (let k = 0; k < was.length; k++) {
      const now = getOwnPropertyDescriptor(object, was[k].key);
      if (now === undefined || !is(now.value, was[k].value) || now.get !== was[k].get || now.set !== was[k].set) {
        return true;
      }
    }
  }
  return false;
}

function watchAll() {
  seen.add(process.moduleLoadList); // which grows by what is required
  watch(globalThis, true);
  watch(given, true);
  for (const each of [
    [][Symbol.iterator](), new Map()[Symbol.iterator](), new Set()[Symbol.iterator](), ""[Symbol.iterator](),
    Uint8Array.prototype, function* () {}, async function () {}, async function* () {},
  ]) {
    watch(getPrototypeOf(each));
    watch(getPrototypeOf(getPrototypeOf(each)));
  }
  watch(process, true);
  watch(getPrototypeOf(process));
  watch(process.env);
  watch(require("module"), true);
}

let fault = null;
let broken = false;
let waiting = null;
let quiet = 0;

function fail(error) {
  fault = fault ?? { error };
  broken = true;
  if (waiting !== null) {
    waiting(error);
  }
}

const turn = () => new Promise((resolve) => later(resolve));

function spoilt() {
  return broken || process.getActiveResourcesInfo().length !== quiet || changed();
}

/* ---- values ---- */

class TooLong extends Error {}

function written(value, most) {
  const parts = [];
  const above = new Set();
  let size = 0;
  const say = (text) => {
    size += text.length;
    if (size > most) {
      throw new TooLong(`an answer of more than ${most} bytes`);
    }
    parts.push(text);
  };
  const list = (items) => {
    for (let n = 0; n < items.length; n++) {
      say(n === 0 ? "[" : ",");
      write(items[n]);
    }
    say(items.length === 0 ? "[]" : "]");
  };
  const collected = (each, whole, pairs) => {
    const items = [];
    apply(each, whole, [(item, key) => items.push(pairs ? [key, item] : item)]);
    return items;
  };
  const objects = (found) => {
    if (isArray(found)) {
      list(found);
    } else if (types.isDate(found)) {
      const time = apply(timeOf, found, []);
      say(`{"D":${isFinite(time) ? time : null}}`);
    } else if (types.isMap(found) || types.isSet(found)) {
      const pairs = types.isMap(found);
      say(pairs ? '{"m":' : '{"s":');
      list(collected(pairs ? eachOfMap : eachOfSet, found, pairs));
      say("}");
    } else if (types.isTypedArray(found)) {
      const told_ = [kindOfTyped, bufferOf, offsetOf, lengthOf].map((get) => apply(get, found, []));
      const [kind, buffer, at, length] = told_;
      if (length > most) {
        say(" ".repeat(most + 1));
      }
      say(`{"y":["${kind}","${Buffer.from(buffer, at, length).toString("base64")}"]}`);
    } else if (special(found)) {
      throw new TypeError(`${apply(tagOf, found, []).slice(8, -1)} is not a plain value`);
    } else {
      const keys = keysOf(found);
      say('{"o":[');
      for (let n = 0; n < keys.length; n++) {
        say(`${n === 0 ? "" : ","}[${quoted(keys[n])},`);
        write(found[keys[n]]);
        say("]");
      }
      say("]}");
    }
  };
  function write(found) {
    switch (typeof found) {
      case "undefined":
        return say('{"u":0}');
      case "boolean":
        return say(found ? "true" : "false");
      case "string":
        return say(quoted(found));
      case "number":
        return say(isFinite(found) && !is(found, -0) ? `${found}` : `{"f":"${is(found, -0) ? "-0" : found}"}`);
      case "bigint":
        return say(`{"i":"${found < 0n ? "-" : ""}0x${(found < 0n ? -found : found).toString(16)}"}`);
      case "object":
        break;
      default:
        throw new TypeError(`a ${typeof found} is not a plain value`);
    }
    if (found === null) {
      return say("null");
    }
    if (above.has(found)) {
      throw new TypeError("a cycle is not a plain value");
    }
    if (above.size > DEEPEST) {
      throw new TypeError(`a value nested deeper than ${DEEPEST} is not plain`);
    }
    above.add(found);
    objects(found);
    above.delete(found);
    return undefined;
  }
  write(value);
  return parts.join("");
}

const SPECIAL = [
  types.isNativeError, types.isPromise, types.isRegExp, types.isWeakMap, types.isWeakSet, types.isBoxedPrimitive,
  types.isAnyArrayBuffer, types.isDataView, types.isGeneratorObject, types.isMapIterator, types.isSetIterator,
  types.isModuleNamespaceObject, (found) => found instanceof Error,
];
const special = (found) => SPECIAL.some((is_) => is_(found));

function told(error) {
  try {
    if (!types.isNativeError(error) && !(error instanceof Error)) {
      return `thrown ${typeof error}: ${String(error)}`.slice(0, TOLD);
    }
    const { name, constructor } = error;
    const known_ = name === "Error" && typeof constructor?.name === "string" ? constructor.name : name;
    return `${String(known_)}: ${String(error.message)}`.slice(0, TOLD);
  } catch {
    return "Error: "; // the program's own exception may raise in its text
  }
}

/* ---- runs ---- */

function settled(promise) {
  return new Promise((resolve, reject) => {
    waiting = reject;
    apply(then, promise, [resolve, reject]);
  });
}

async function run(realm, mark, { values, open }, source, entry, most) {
  try {
    const { self, found } = entryOf(realm, source, entry);
    for (let n = 0; n < open.length; n++) {
      const script = new vm.Script(`(${open[n][2]}\n)`, { filename: "argument.js" });
      realm.inner.put(open[n][0], open[n][1], script.runInContext(realm.global));
    }
    send(mark, "A");
    receive();
    let value = apply(found, self, values);
    if (types.isPromise(value)) {
      value = await settled(value);
    }
    send(mark, "D");
    receive(); // its clock is right only while it waits
    await turn(); // what it left to be done at once is done before the answer is written, and counts
    if (fault !== null) {
      throw fault.error;
    }
    send(mark, "V", written(value, most));
  } catch (error) {
    send(mark, error instanceof TooLong ? "F" : "E", error instanceof TooLong ? error.message : told(error));
  } finally {
    waiting = null;
  }
}

/* What collects garbage between runs: the young always, so that each run begins alike, all of it once there is some. */
function collector() {
  v8.setFlagsFromString("--expose-gc");
  const gc = vm.runInNewContext("gc");
  v8.setFlagsFromString("--no-expose-gc");
  let least = 0;
  return () => {
    const { used_heap_size, external_memory } = v8.getHeapStatistics();
    if (used_heap_size + external_memory < least + GARBAGE) {
      gc({ type: "minor" });
      return;
    }
    gc();
    const now = v8.getHeapStatistics();
    least = now.used_heap_size + now.external_memory;
  };
}

async function serve() {
  const collect = collector();
  await fs.promises.stat("/"); // its threads are started here: from the next line on it may start none, and no process
  spawnSync("prlimit", ["--nproc=0:0", "--pid", `${process.pid}`]);
  process.on("uncaughtException", fail);
  process.on("unhandledRejection", fail);
  process.on("beforeExit", () => {
    if (waiting !== null) {
      waiting(new Error("the promise never settles"));
    }
  });
  const nobody = Buffer.alloc(16);
  if (vm.constants?.DONT_CONTEXTIFY === undefined) {
    send(nobody, "E", `Node ${process.version} is too old: 20.18 or later is needed`);
    return;
  }
  try {
    newRealm();
  } catch (error) {
    send(nobody, "M", told(error));
    return;
  }
  await turn();
  await turn();
  quiet = process.getActiveResourcesInfo().length;
  watchAll();
  send(nobody, "H");
  for (;;) {
    const { mark, text } = receive();
    const [source, entry, most] = parse(text);
    const given_ = receive().text;
    fault = null;
    await turn();
    if (spoilt()) {
      send(mark, "R", "1");
      continue;
    }
    const realm = newRealm();
    const read = realm.inner.read(given_);
    collect();
    send(mark, "R", "0");
    receive();
    await run(realm, mark, read, source, entry, most);
  }
}

serve();
