/** Running programs in Node, with onnxruntime-node: CPU, WebGPU, CUDA, DirectML, CoreML. */

import './telemetry.node.ts';
import { availableParallelism } from 'node:os';
import { dirname } from 'node:path';
import { InferenceSession, listSupportedBackends, Tensor } from 'onnxruntime-node';
import { MmditxError } from '../errors.ts';
import {
  type CompileOptions,
  createRuntime,
  DEVICES,
  type Device,
  type Runtime,
  unavailable,
  webgpuProvider,
} from './runtime.ts';

export interface NodeRuntimeOptions {
  /** Default `cpu`; `load` takes the fastest that works (`fastest.node.ts`). */
  device?: Device;
  /** Threads of the CPU device (default: the machine's processors, at most 16). */
  threads?: number;
}

const REMEDY: Record<Device, string> = {
  cpu: 'Reinstall onnxruntime-node.',
  webgpu: 'It needs a graphics driver for Vulkan, Direct3D 12 or Metal; choose device "cpu" otherwise.',
  cuda:
    'It needs Linux, an NVIDIA GPU, CUDA 12 and onnxruntime-node installed with ONNXRUNTIME_NODE_INSTALL=cuda12; ' +
    'choose device "webgpu" or "cpu" otherwise.',
  dml: 'It needs Windows with a Direct3D 12 GPU; choose device "webgpu" or "cpu" otherwise.',
  coreml: 'It needs macOS; choose device "webgpu" or "cpu" otherwise.',
};

/** Devices that the installed onnxruntime-node has code for; whether the hardware is there shows when it is used. */
export function availableDevices(): Device[] {
  const built = new Set(listSupportedBackends().map(({ name }) => name));
  return DEVICES.filter((device) => built.has(device));
}

/**
 * A runtime on a device of this machine.
 * @throws MmditxError `device-unavailable`, here or at the first compilation, with what the device needs
 */
export function nodeRuntime(options: NodeRuntimeOptions = {}): Runtime {
  const { device = 'cpu', threads = Math.min(availableParallelism(), 16) } = options;
  if (!DEVICES.includes(device)) {
    throw new MmditxError('bad-option', `There is no device "${device}"; choose one of ${DEVICES.join(', ')}.`);
  }
  if (!Number.isSafeInteger(threads) || threads < 1) {
    throw new MmditxError('bad-option', `The number of threads is ${threads}; it must be a whole number from 1.`);
  }
  if (!availableDevices().includes(device)) {
    throw unavailable(device, REMEDY[device]);
  }
  return createRuntime({
    device,
    Tensor,
    remedy: REMEDY[device],
    createSession: (model, compile) =>
      InferenceSession.create(model.bytes, sessionOptions(device, threads, model.lookups, compile)),
  });
}

/** Passes of ONNX Runtime that would convert every weight once and keep the result beside it. */
const WEIGHT_EXPANDERS = 'ConstantFolding;FuseFp16InitializerToFp32NodeTransformer';

function sessionOptions(
  device: Device,
  threads: number,
  lookups: readonly string[],
  compile: CompileOptions,
): InferenceSession.SessionOptions {
  const folders = new Set((compile.files ?? []).flatMap(({ path }) => (path ? [dirname(path)] : [])));
  if (folders.size > 1) throw new RangeError('The weights of one program must lie in one folder.');
  const [folder] = folders;
  const inMemory = (compile.files ?? []).flatMap(({ name, bytes }) => (bytes ? [{ path: name, data: bytes }] : []));
  return {
    executionProviders: device === 'cpu' ? ['cpu'] : [device === 'webgpu' ? webgpuProvider(lookups) : device, 'cpu'],
    graphOptimizationLevel: 'all',
    ...(compile.keepBuffers === false && { enableCpuMemArena: false }),
    intraOpNumThreads: threads,
    interOpNumThreads: 1,
    logSeverityLevel: 3,
    ...(inMemory.length > 0 ? { externalData: inMemory } : {}),
    ...(compile.profile ? { enableProfiling: true, profileFilePrefix: compile.profile } : {}),
    extra: {
      session: {
        // ONNX Runtime makes one operator of a dequantisation and a product, and would round the activations to 8 bits.
        qdq_matmulnbits_accuracy_level: '1',
        // Each session has threads of its own: those of one that has run would keep the processors from the next.
        force_spinning_stop: '1',
        ...(folder && { model_external_initializers_file_folder_path: folder }),
        ...(compile.packWeights === false && { disable_prepacking: '1' }),
      },
      ...(compile.expandWeights === false && { optimization: { disable_specified_optimizers: WEIGHT_EXPANDERS } }),
    },
  };
}
