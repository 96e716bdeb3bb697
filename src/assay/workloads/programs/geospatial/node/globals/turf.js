"use strict";
globalThis.turf = require("@turf/turf");
