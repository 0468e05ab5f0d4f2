/** Running programs in Node, with onnxruntime-node: CPU, WebGPU, CUDA, DirectML, CoreML. */

import { availableParallelism } from 'node:os';
import { dirname } from 'node:path';
import { InferenceSession, listSupportedBackends, Tensor } from 'onnxruntime-node';
import { MmditxError } from '../errors.ts';
import { type CompileOptions, createRuntime, type Device, DEVICES, type Runtime } from './runtime.ts';

export interface NodeRuntimeOptions {
  /** Default: the fastest device that this machine has and this package has been tested on, else `cpu`. */
  device?: Device;
  /** Threads of the CPU device (default: the machine's processors, at most 16). */
  threads?: number;
}

const REMEDY: Record<Device, string> = {
  cpu: 'Reinstall onnxruntime-node.',
  webgpu: 'It needs a graphics driver with Vulkan, Direct3D 12 or Metal; use --device cpu otherwise.',
  cuda: 'It needs an NVIDIA GPU and CUDA 12; install with ONNXRUNTIME_NODE_INSTALL=cuda12, or use --device cpu.',
  dml: 'DirectML exists on Windows only; use --device cpu otherwise.',
  coreml: 'CoreML exists on macOS only; use --device cpu otherwise.',
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
  if (!availableDevices().includes(device)) {
    throw new MmditxError('device-unavailable', `Device "${device}" is not available here. ${REMEDY[device]}`);
  }
  return createRuntime({
    device,
    Tensor,
    async createSession(model, compile) {
      try {
        return await InferenceSession.create(model, sessionOptions(device, threads, compile));
      } catch (error) {
        throw device === 'cpu' ? error : unavailable(device, error);
      }
    },
  });
}

function unavailable(device: Device, cause: unknown): MmditxError {
  const reason = cause instanceof Error ? cause.message.split('\n')[0]! : String(cause);
  return new MmditxError('device-unavailable', `Device "${device}" failed to start: ${reason}. ${REMEDY[device]}`, {
    cause,
  });
}

function sessionOptions(device: Device, threads: number, compile: CompileOptions): InferenceSession.SessionOptions {
  const folders = new Set((compile.files ?? []).flatMap(({ path }) => (path ? [dirname(path)] : [])));
  if (folders.size > 1) throw new RangeError('The weights of one program must lie in one folder.');
  const [folder] = folders;
  const inMemory = (compile.files ?? []).flatMap(({ name, bytes }) => (bytes ? [{ path: name, data: bytes }] : []));
  return {
    executionProviders: device === 'cpu' ? ['cpu'] : [device, 'cpu'],
    graphOptimizationLevel: 'all',
    intraOpNumThreads: threads,
    interOpNumThreads: 1,
    logSeverityLevel: 3,
    ...(inMemory.length > 0 ? { externalData: inMemory } : {}),
    ...(compile.profile ? { enableProfiling: true, profileFilePrefix: compile.profile } : {}),
    extra: folder ? { session: { model_external_initializers_file_folder_path: folder } } : {},
  };
}
