/** Running programs in a browser, with onnxruntime-web: WebAssembly on the processor, or WebGPU. */

import type { Env, InferenceSession } from 'onnxruntime-common';
import { createRuntime, type Runtime, unavailable, webgpuProvider } from './runtime.ts';
import { oneAtATime } from './turns.ts';

export interface WebRuntimeOptions {
  /** Default: `webgpu` where the browser has a graphics device that works and is not imitated in software, else `cpu`. */
  device?: 'cpu' | 'webgpu';
  /**
   * Threads of the `cpu` device (default: half of the processors, at most 4). More than one needs a page that is
   * cross-origin isolated (https://web.dev/articles/coop-coep). What the first runtime of a page asks for stays.
   */
  threads?: number;
  /** Where onnxruntime-web's `.wasm` and `.mjs` files are served (default: beside the bundled script). Set once for a page. */
  wasmPaths?: Env.WasmPrefixOrFilePaths;
}

const REMEDY = {
  cpu: 'It needs WebAssembly, and the .wasm files of onnxruntime-web served where the option wasmPaths says.',
  webgpu:
    'It needs a browser with WebGPU and a graphics driver that the browser trusts; choose device "cpu" otherwise.',
} as const;

/**
 * A runtime on a device of this browser. Weights are given as bytes ({@link WeightFile.bytes}).
 * @throws MmditxError `device-unavailable` with what the device needs
 */
export async function webRuntime(options: WebRuntimeOptions = {}): Promise<Runtime> {
  if (options.device) return start(options.device, options);
  if (await hasGraphicsDevice()) {
    try {
      return await start('webgpu', options);
    } catch {
      // Announced by the browser, but it does not run: the processor always does.
    }
  }
  return start('cpu', options);
}

async function start(device: 'cpu' | 'webgpu', { threads, wasmPaths }: WebRuntimeOptions): Promise<Runtime> {
  if (device === 'webgpu' && !(await graphicsAdapter())) throw unavailable(device, REMEDY[device]);
  const ort = await (device === 'webgpu' ? import('onnxruntime-web/webgpu') : import('onnxruntime-web/wasm'));
  if (threads !== undefined) ort.env.wasm.numThreads = threads;
  if (wasmPaths !== undefined) ort.env.wasm.wasmPaths = wasmPaths;
  const inTurn = turns[device];
  const runtime = createRuntime({
    device,
    Tensor: ort.Tensor,
    remedy: REMEDY[device],
    async createSession({ bytes, lookups }, { files = [] }) {
      const session = await inTurn(() =>
        ort.InferenceSession.create(bytes, {
          executionProviders: device === 'webgpu' ? [webgpuProvider(lookups), 'wasm'] : ['wasm'],
          graphOptimizationLevel: 'all',
          logSeverityLevel: 3,
          externalData: files.flatMap(({ name, bytes }) => (bytes ? [{ path: name, data: bytes }] : [])),
        }),
      );
      return {
        run: (feeds: InferenceSession.FeedsType) => inTurn(() => session.run(feeds)),
        release: () => inTurn(() => session.release()),
        endProfiling: () => session.endProfiling(),
      };
    },
  });
  await runtime.check();
  return runtime;
}

/**
 * The sessions of one WebAssembly module share its stack and its mounted files across their awaits, so they load and
 * run one at a time.
 */
const turns = { cpu: oneAtATime(), webgpu: oneAtATime() };

async function graphicsAdapter(): Promise<GPUAdapter | undefined> {
  const gpu: GPU | undefined = globalThis.navigator?.gpu;
  return (await gpu?.requestAdapter()) ?? undefined;
}

async function hasGraphicsDevice(): Promise<boolean> {
  const adapter = await graphicsAdapter();
  return adapter !== undefined && !adapter.info.isFallbackAdapter;
}
