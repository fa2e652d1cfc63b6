// Validates custom resources against the schemas of their operators: a JSON array of objects on standard input, a JSON
// array of their faults on standard output, null for an object without. A field that its schema does not know is a fault
// too: the packages let it pass, as an API server would drop it. So what validation never reads is found and named.
import { readFileSync } from "node:fs";
import { HTTPRoute } from "./node_modules/@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1/index.mjs";
import { ScaledObject } from "./node_modules/@kubernetes-models/keda/keda.sh/v1alpha1/index.mjs";
// By path: its package.json names a file that it does not have to those who import it by name.
import { PrometheusRule, ServiceMonitor } from "./node_modules/@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/index.js";

const KINDS = { HTTPRoute, PrometheusRule, ScaledObject, ServiceMonitor };

// A view of a value that notes in `read` each field that is looked at, by its path.
function watch(value, path, read) {
  return new Proxy(value, {
    get(target, name) {
      const found = target[name];
      if (typeof name === "symbol" || !Object.hasOwn(target, name)) return found;
      const place = `${path}/${name}`;
      read.add(place);
      return typeof found === "object" && found !== null ? watch(found, place, read) : found;
    },
  });
}

function unread(value, path, read) {
  return Object.entries(value).flatMap(([name, found]) => {
    const place = `${path}/${name}`;
    if (!read.has(place)) return [place];
    return typeof found === "object" && found !== null ? unread(found, place, read) : [];
  });
}

function fault(object) {
  const Kind = KINDS[object.kind];
  if (Kind === undefined) return `no schema of ${object.apiVersion} ${object.kind}`;
  const model = new Kind(object);
  const read = new Set();
  try {
    Kind.prototype.validate.call(watch(model, "", read));
  } catch (error) {
    return error.message;
  }
  const unknown = unread(model.toJSON(), "", read);
  return unknown.length ? `unknown fields: ${unknown.join(", ")}` : null;
}

process.stdout.write(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(fault)));
