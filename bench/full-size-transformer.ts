/**
 * One forward pass of Stable Diffusion 3.5 Medium's transformer in int8 against PyTorch in bfloat16, on the same random
 * weights of full size, taking turns.
 */

import { join } from 'node:path';
import type { TransformerConfig } from '../src/models/config.ts';
import { loadTransformer } from '../src/models/transformer.ts';
import { nodeRuntime } from '../src/runtime/node.node.ts';
import { floats } from '../src/tensor/index.ts';
import type { PartWeights } from '../src/weights/checkpoint.ts';
import { convertParts } from '../src/weights/converted.node.ts';
import { FULL_SIZE_FOLDER, fullSizeFiles } from './full-size.ts';
import { transformerInputs, withModel } from './models.ts';
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
await withModel(checkpointFile!, async (checkpoint) => {
  const folder = join(FULL_SIZE_FOLDER, 'converted');
  const converted = await convertParts(checkpoint, ['transformer'], 'int8', { folder });
  const part = converted.checkpoint.parts.transformer!;
  const peer = await startPeer();
  await peer?.ask({ op: 'load', file: checkpointFile, dtype: 'bfloat16' });
  const runtime = nodeRuntime({ threads: THREADS });
  const transformer = loadTransformer(runtime, part, { expandWeights: false });
  for (const [side, turns] of CASES) rows.push(await measure(transformer, part, side, turns, peer));
  await transformer.dispose();
  peer?.stop();
  await converted.close();
  await publish({
    title: 'Full-size transformer in int8, seconds per forward pass against PyTorch bfloat16',
    rows,
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
