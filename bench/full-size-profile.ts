/**
 * Where a step of the full-size transformer in int8 spends its time, and what share of the machine's own peak its
 * products reach.
 */

import { join } from 'node:path';
import type { TransformerConfig } from '../src/models/config.ts';
import { loadTransformer } from '../src/models/transformer.ts';
import type { Runtime } from '../src/runtime/runtime.ts';
import { dequantize, floats, input, linear, parameter, type TensorData } from '../src/tensor/index.ts';
import type { PartWeights } from '../src/weights/checkpoint.ts';
import { convertParts } from '../src/weights/converted.node.ts';
import { FULL_SIZE_FOLDER, fullSizeFiles } from './full-size.ts';
import { normalFloats, transformerInputs, withModel } from './models.ts';
import { profileOperators } from './operators.ts';
import { publish, QUICK, type Row, rounded, THREADS } from './support.ts';

/** Context tokens: both CLIPs' and T5's 77. */
const TEXT_TOKENS = 154;
const PIXELS_PER_TOKEN = 16;
/** Side of a step that is profiled, and rows and columns of the products whose speed counts as the machine's peak. */
const PROFILED_SIDE = QUICK ? 64 : 512;
const PEAK_SIZE = { rows: 1024, in: 6144, out: 1536 };

const [checkpointFile] = await fullSizeFiles();
await withModel(checkpointFile!, async (checkpoint) => {
  const folder = join(FULL_SIZE_FOLDER, 'converted');
  const converted = await convertParts(checkpoint, ['transformer'], 'int8', { folder });
  const rows = await peaksAndProfile(converted.checkpoint.parts.transformer!);
  await converted.close();
  await publish({
    title: `A step of the full-size transformer in int8 at ${PROFILED_SIDE}x${PROFILED_SIDE}: peak and profile`,
    rows,
    settings: { threads: THREADS, text: TEXT_TOKENS },
  });
});

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
    's a step': rounded(seconds),
    'share of step, %': rounded((100 * seconds) / step, 2),
    'G operations/s': rounded(operations / seconds / 1e9),
    'measured peak': rounded(peak / 1e9),
    'share of peak, %': rounded((100 * operations) / seconds / peak, 2),
  });
  const ideal = products / int8 + attention / fp32;
  return [
    speed('products in int8 (of the arithmetic)', products, secondsOf('MatMulIntegerToFloat'), int8),
    speed('attention in fp32 (of the arithmetic)', attention, secondsOf('MultiHeadAttention'), fp32),
    { what: 'the whole step', 's a step': rounded(step), 'share of peak, %': rounded((100 * ideal) / step, 2) },
    ...operators.slice(0, 12).map(({ operator, microseconds }) => ({
      what: operator,
      's a step': rounded(microseconds / 1e6 / runs),
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

/** Operations a second of one large product. */
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
  const feed = { x: normalFloats([rows, width], 2) };
  const load = (runtime: Runtime) => {
    const program = runtime.compile(
      { outputs: { y: linear(x, weight) } },
      { bind: ({ name }) => (name === 's' ? scales : precision === 'fp32' ? random : int8) },
    );
    return { call: async () => (await program).run(feed), dispose: async () => (await program).dispose() };
  };
  const { operators } = await profileOperators(load, QUICK ? 2 : 30);
  const product = operators.find(
    ({ operator }) => operator === (precision === 'fp32' ? 'Gemm' : 'MatMulIntegerToFloat'),
  );
  const seconds = product!.microseconds / product!.calls / 1e6;
  return (2 * rows * width * out) / seconds;
}
