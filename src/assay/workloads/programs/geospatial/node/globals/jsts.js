"use strict";
globalThis.jsts = require("./jsts.min.js");
