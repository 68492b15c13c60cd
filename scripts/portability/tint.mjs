// Compiles WGSL with Tint, the compiler of Chromium's browsers, without a GPU: Dawn's null backend.
//
//   node tint.mjs FOLDER_WITH_WEBGPU LIST
//
// LIST names one WGSL file a line; for each, one line of JSON says whether Tint takes it: {"file", "error"}.
// `enable subgroups;` goes in front of what uses them: naga 30, through which our kernels go, refuses that line.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const [folder, list] = process.argv.slice(2);
const find = createRequire(resolve(folder, 'package.json'));
const { create, globals } = await import(pathToFileURL(find.resolve('webgpu')));
Object.assign(globalThis, globals);

const instance = create(['backend=null']);
const adapter = await instance.requestAdapter();
const requiredFeatures = ['shader-f16', 'subgroups'].filter((feature) => adapter.features.has(feature));
const device = await adapter.requestDevice({ requiredFeatures });

async function refusal(file) {
  const source = readFileSync(file, 'utf8');
  const isDeclared = /^\s*enable\s+subgroups\s*;/m.test(source);
  // On the same line, so that places stay what they are.
  const code = /subgroup/.test(source) && !isDeclared ? `enable subgroups; ${source}` : source;
  device.pushErrorScope('validation');
  const module = device.createShaderModule({ code });
  const info = await module.getCompilationInfo();
  const scope = await device.popErrorScope();
  const errors = info.messages.filter((message) => message.type === 'error');
  if (errors.length > 0) return errors.map((m) => `${m.lineNum}:${m.linePos}: ${m.message}`).join('\n');
  return scope ? scope.message : null;
}

for (const file of readFileSync(list, 'utf8').split('\n').filter((line) => line !== '')) {
  console.log(JSON.stringify({ file, error: await refusal(file) }));
}
// Dawn's threads would keep the process alive.
process.exit(0);
