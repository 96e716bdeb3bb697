"use strict";
globalThis.geolib = require("geolib");
