/**
 * One forward pass of Stable Diffusion 3.5 Medium's transformer in int8 against PyTorch in bfloat16, on the same random
 * weights of full size, taking turns; and where its time goes.
 */

import { join } from 'node:path';
import type { TransformerConfig } from '../src/models/config.ts';
import { loadTransformer } from '../src/models/transformer.ts';
import { nodeRuntime } from '../src/runtime/node.node.ts';
import type { Runtime } from '../src/runtime/runtime.ts';
import { dequantize, floats, input, linear, parameter, type TensorData } from '../src/tensor/index.ts';
import type { PartWeights } from '../src/weights/checkpoint.ts';
import { convertParts } from '../src/weights/converted.node.ts';
import { FULL_SIZE_FOLDER, fullSizeFiles } from './full-size.ts';
import { normalFloats, transformerInputs, withModel } from './models.ts';
import { profileOperators } from './operators.ts';
import { fromMessage, type MessageTensor, type Peer, startPeer, toMessage } from './peer.ts';
import { median, publish, QUICK, type Row, rounded, THREADS, timeCalls } from './support.ts';

/** Context tokens: both CLIPs' and T5's 77. */
const TEXT_TOKENS = 154;
/** Side in pixels, and turns of each side after one that does not count. */
const CASES = QUICK
  ? [[64, 1] as const]
  : ([
      [256, 5],
      [512, 5],
      [1024, 1],
    ] as const);
const PIXELS_PER_TOKEN = 16;

const [checkpointFile] = await fullSizeFiles();
const rows: Row[] = [];
const profileRows: Row[] = [];
await withModel(checkpointFile!, async (checkpoint) => {
  const folder = join(FULL_SIZE_FOLDER, 'converted');
  const converted = await convertParts(checkpoint, ['transformer'], 'int8', { folder });
  const part = converted.checkpoint.parts.transformer!;
  const peer = await startPeer();
  await peer?.ask({ op: 'load', file: checkpointFile, dtype: 'bfloat16' });
  const runtime = nodeRuntime({ threads: THREADS });
  const start = performance.now();
  const transformer = loadTransformer(runtime, part, { expandWeights: false });
  for (const [side, turns] of CASES) rows.push(await measure(transformer, part, side, turns, peer));
  console.error(`Loaded and measured in ${rounded((performance.now() - start) / 1000)} s`);
  await transformer.dispose();
  peer?.stop();
  profileRows.push(...(await peaksAndProfile(part)));
  await converted.close();
  await publish({
    title: 'Full-size transformer in int8, seconds per forward pass against PyTorch bfloat16',
    rows: [...rows, ...profileRows],
    settings: { threads: THREADS, torch: peer?.torch ?? 'not installed', text: TEXT_TOKENS },
  });
});

type Transformer = ReturnType<typeof loadTransformer>;

async function measure(
  transformer: Transformer,
  part: PartWeights<TransformerConfig>,
  side: number,
  turns: number,
  peer: Peer | undefined,
): Promise<Row> {
  const tokens = (side / PIXELS_PER_TOKEN) ** 2;
  const { latent, timesteps, context, pooled } = transformerInputs(part.config, tokens, TEXT_TOKENS);
  const call = () => transformer.velocities(latent, timesteps, [{ context, pooled }]);
  const [velocity] = await call();
  const inputs = { latent, timestep: floats([1], timesteps), context, pooled };
  const messages = Object.fromEntries(Object.entries(inputs).map(([key, tensor]) => [key, toMessage(tensor)]));
  const forward = () =>
    peer!.ask<{ seconds: number[]; velocity: MessageTensor }>({ op: 'forward', inputs: messages, calls: 1 });
  const ours: number[] = [];
  const theirs: number[] = [];
  const first = peer && (await forward());
  for (let turn = 0; turn < turns; turn++) {
    ours.push(...(await timeCalls(call, 1)));
    if (peer) theirs.push(...(await forward()).seconds);
  }
  const size = { what: `${side} x ${side}`, 'ours, s': rounded(median(ours)) };
  if (!first) return size;
  return {
    ...size,
    'PyTorch bf16, s': rounded(median(theirs)),
    'ours / PyTorch': rounded(median(ours) / median(theirs)),
    'relative difference': rounded(relativeError(velocity!.data, fromMessage(first.velocity).data), 2),
  };
}

/** Root of the mean squared difference over that of the reference. */
function relativeError(values: Float32Array, reference: Float32Array): number {
  let [difference, size] = [0, 0];
  for (const [i, value] of values.entries()) {
    difference += (value - reference[i]!) ** 2;
    size += reference[i]! ** 2;
  }
  return Math.sqrt(difference / size);
}

/** Side of a step that is profiled, and rows and columns of the products whose speed counts as the machine's peak. */
const PROFILED_SIDE = QUICK ? 64 : 512;
const PEAK_SIZE = { rows: 1024, in: 6144, out: 1536 };

async function peaksAndProfile(part: PartWeights<TransformerConfig>): Promise<Row[]> {
  const tokens = (PROFILED_SIDE / PIXELS_PER_TOKEN) ** 2;
  const { latent, timesteps, context, pooled } = transformerInputs(part.config, tokens, TEXT_TOKENS);
  const load = (runtime: Runtime) => {
    const { velocities, dispose } = loadTransformer(runtime, part, { expandWeights: false });
    return { call: () => velocities(latent, timesteps, [{ context, pooled }]), dispose };
  };
  const runs = QUICK ? 1 : 4;
  const { operators, total } = await profileOperators(load, runs);
  const [int8, fp32] = [await productPeak('int8'), await productPeak('fp32')];
  const { products, attention } = arithmetic(part.config, tokens, TEXT_TOKENS);
  const secondsOf = (operator: string) =>
    (operators.find((entry) => entry.operator === operator)?.microseconds ?? Number.NaN) / 1e6 / runs;
  const step = total / 1e6 / runs;
  const speed = (what: string, operations: number, seconds: number, peak: number): Row => ({
    what,
    'ours, s': rounded(seconds),
    'G operations/s': rounded(operations / seconds / 1e9),
    'measured peak': rounded(peak / 1e9),
    'share of peak, %': rounded((100 * operations) / seconds / peak, 2),
  });
  const ideal = products / int8 + attention / fp32;
  return [
    speed('products in int8', products, secondsOf('MatMulIntegerToFloat'), int8),
    speed('attention in fp32', attention, secondsOf('MultiHeadAttention'), fp32),
    {
      what: `a whole step at ${PROFILED_SIDE}`,
      'ours, s': rounded(step),
      'share of peak, %': rounded((100 * ideal) / step, 2),
    },
    ...operators.slice(0, 12).map(({ operator, microseconds }) => ({
      what: operator,
      'ours, s': rounded(microseconds / 1e6 / runs),
      'share of step, %': rounded((100 * microseconds) / total, 2),
    })),
  ];
}

/** Multiplications and additions of a pass: in the blocks' linear layers, and in attention. */
function arithmetic(config: TransformerConfig, image: number, text: number): { products: number; attention: number } {
  const { hiddenSize: c, mlpHidden, depth, dualAttentionLayers } = config;
  const perToken = 4 * c * c + 2 * c * mlpHidden;
  const dual = dualAttentionLayers.length;
  const linear = depth * image * perToken + dual * image * 4 * c * c + (depth - 1) * text * perToken + text * 3 * c * c;
  return { products: 2 * linear, attention: 4 * c * (depth * (image + text) ** 2 + dual * image ** 2) };
}

/** Operations a second of one large product, the fastest of many. */
async function productPeak(precision: 'int8' | 'fp32'): Promise<number> {
  const { rows, in: width, out } = PEAK_SIZE;
  const x = input('x', 'float32', [rows, width]);
  const random = normalFloats([out, width]);
  const int8: TensorData = { dtype: 'int8', shape: [width, out], data: Int8Array.from(random.data, (v) => 40 * v) };
  const scales = floats([out], new Float32Array(out).fill(1e-3));
  const weight =
    precision === 'fp32'
      ? parameter('w', 'float32', [out, width])
      : dequantize('int8', parameter('w', 'int8', [width, out]), parameter('s', 'float32', [out]));
  const program = await nodeRuntime({ threads: THREADS }).compile(
    { outputs: { y: linear(x, weight) } },
    { bind: ({ name }) => (name === 's' ? scales : precision === 'fp32' ? random : int8) },
  );
  const feed = { x: normalFloats([rows, width], 2) };
  await program.run(feed);
  const seconds = Math.min(...(await timeCalls(() => program.run(feed), QUICK ? 2 : 30)));
  await program.dispose();
  return (2 * rows * width * out) / seconds;
}
