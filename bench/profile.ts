/** Where the time goes: ONNX Runtime's own profile of the transformer and the VAE's decoder, by operator. */

import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { loadAutoencoder } from '../src/models/autoencoder.ts';
import { type TransformerConfig, type VaeConfig, vaeDownscale } from '../src/models/config.ts';
import { loadTransformer } from '../src/models/transformer.ts';
import { nodeRuntime } from '../src/runtime/node.node.ts';
import type { Runtime } from '../src/runtime/runtime.ts';
import type { PartWeights } from '../src/weights/checkpoint.ts';
import {
  GOLDEN,
  MIDDLE_TRANSFORMER,
  normalFloats,
  SMALL,
  transformerInputs,
  withModel,
  withRandomTransformer,
  withTemporaryFolder,
} from './models.ts';
import { publish, QUICK, type Row, rounded, THREADS } from './support.ts';

/** Runs that count, after one that does not. */
const RUNS = QUICK ? 1 : 10;
/** Operators listed; the rest is one row. */
const LISTED = 8;

/** An event of ONNX Runtime's trace, times in microseconds. */
interface TraceEvent {
  readonly cat: string;
  readonly name: string;
  readonly ts: number;
  readonly dur: number;
  readonly args?: { readonly op_name?: string };
}

interface OperatorTime {
  readonly operator: string;
  readonly calls: number;
  readonly microseconds: number;
}

/** A runtime whose programs write their profile to files that start with `prefix`. */
function profiled(prefix: string): Runtime {
  const runtime = nodeRuntime({ threads: THREADS });
  return { ...runtime, compile: (program, options) => runtime.compile(program, { ...options, profile: prefix }) };
}

/** Time in each operator over all runs but the first, longest first, and the time of the runs as a whole. */
function operatorTimes(trace: readonly TraceEvent[]): { operators: OperatorTime[]; total: number } {
  const runs = trace.filter(({ cat, name }) => cat === 'Session' && name === 'model_run').sort((a, b) => a.ts - b.ts);
  const counted = runs.slice(1);
  const start = counted[0]!.ts;
  const times = new Map<string, { calls: number; microseconds: number }>();
  for (const { cat, name, ts, dur, args } of trace) {
    if (cat !== 'Node' || !name.endsWith('_kernel_time') || ts < start) continue;
    const entry = times.get(args!.op_name!) ?? { calls: 0, microseconds: 0 };
    times.set(args!.op_name!, { calls: entry.calls + 1, microseconds: entry.microseconds + dur });
  }
  const operators = [...times].map(([operator, entry]) => ({ operator, ...entry }));
  return {
    operators: operators.sort((a, b) => b.microseconds - a.microseconds),
    total: counted.reduce((sum, { dur }) => sum + dur, 0),
  };
}

async function readTrace(folder: string): Promise<TraceEvent[]> {
  const [file] = (await readdir(folder)).filter((name) => name.endsWith('.json'));
  if (!file) throw new Error('ONNX Runtime wrote no profile.');
  return JSON.parse(await readFile(join(folder, file), 'utf8')) as TraceEvent[];
}

/** Profiles something that is loaded with a runtime, run several times and disposed of. */
async function profile(
  subject: string,
  load: (runtime: Runtime) => { call(): Promise<unknown>; dispose(): Promise<void> },
): Promise<Row[]> {
  return withTemporaryFolder(async (folder) => {
    const { call, dispose } = load(profiled(join(folder, 'profile')));
    for (let run = 0; run <= RUNS; run++) await call();
    await dispose();
    const { operators, total } = operatorTimes(await readTrace(folder));
    const rest = operators.slice(LISTED);
    const between = total - operators.reduce((sum, { microseconds }) => sum + microseconds, 0);
    const row = ({ operator, calls, microseconds }: OperatorTime) => ({
      subject,
      operator,
      'calls a run': calls / RUNS,
      'ms a run': rounded(microseconds / 1000 / RUNS),
      'share, %': rounded((100 * microseconds) / total, 2),
    });
    const sum = (key: 'calls' | 'microseconds') => rest.reduce((total, entry) => total + entry[key], 0);
    return [
      ...operators.slice(0, LISTED).map(row),
      row({ operator: `${rest.length} others`, calls: sum('calls'), microseconds: sum('microseconds') }),
      row({ operator: 'between operators', calls: 0, microseconds: between }),
    ];
  });
}

/** Something that {@link profile} runs: the transformer on a square of image tokens. */
function transformerLoader(part: PartWeights<TransformerConfig>, tokens: number, length: number) {
  const inputs = transformerInputs(part.config, tokens, length);
  return (runtime: Runtime) => {
    const { velocities, dispose } = loadTransformer(runtime, part);
    return { call: () => velocities(inputs.latent, inputs.timesteps, [inputs]), dispose };
  };
}

/** The same: the decoder on a square latent. */
function decoderLoader(part: PartWeights<VaeConfig>, side: number) {
  const latent = normalFloats([1, part.config.latentChannels, side, side]);
  return (runtime: Runtime) => {
    const { decode, dispose } = loadAutoencoder(runtime, part);
    return { call: () => decode(latent), dispose };
  };
}

const rows: Row[] = [];
const [name, file, side] = SMALL ? (['small', SMALL, 128] as const) : (['golden', GOLDEN, 256] as const);
await withModel(file, async ({ parts: { transformer, vae, clipL, t5 } }) => {
  const latentSide = side / vaeDownscale(vae!.config);
  const tokens = (latentSide / transformer!.config.patchSize) ** 2;
  const length = clipL!.config.positions + t5!.config.tokens;
  const subject = `${name} transformer, ${tokens} + ${length} tokens`;
  rows.push(...(await profile(subject, transformerLoader(transformer!, tokens, length))));
  rows.push(...(await profile(`${name} VAE decoder, ${side} x ${side}`, decoderLoader(vae!, latentSide))));
});
if (!QUICK) {
  await withRandomTransformer(MIDDLE_TRANSFORMER, async (part) => {
    rows.push(...(await profile('middle transformer, 1024 + 154 tokens', transformerLoader(part, 1024, 154))));
  });
}
await publish({ title: 'Where the time goes', rows, settings: { threads: THREADS } });
