/** One training step (loss, gradients, clipping, AdamW) against PyTorch's autograd on equal weights, taking turns. */

import { join } from 'node:path';
import type { TransformerConfig } from '../src/models/config.ts';
import { centreCorner } from '../src/models/mmditx.ts';
import { nodeRuntime } from '../src/runtime/node.node.ts';
import { type FloatTensor, floats } from '../src/tensor/data.ts';
import { gradientSource } from '../src/training/gradients.ts';
import { flowBatch } from '../src/training/loss.ts';
import { diffusionSegments } from '../src/training/objective.ts';
import { isLearned, readParameters, wholePart } from '../src/training/parts.ts';
import { createTrainer } from '../src/training/trainer.ts';
import { threadedUpdater } from '../src/training/updates.node.ts';
import type { PartWeights } from '../src/weights/checkpoint.ts';
import { normalFloats, SMALL_TRANSFORMER, withModel, withRandomTransformer } from './models.ts';
import { startPeer, toMessage } from './peer.ts';
import { callsFor, median, publish, QUICK, ROOT, type Row, rounded, THREADS, takeTurns, timeCalls } from './support.ts';

interface BatchSize {
  readonly items: number;
  readonly height: number;
  readonly width: number;
  /** Context tokens. */
  readonly length: number;
}

/** That of the golden training step. */
const GOLDEN_BATCH: BatchSize = { items: 2, height: 6, width: 10, length: 9 };
/** Pictures of 128 x 128. */
const SMALL_BATCH: BatchSize = { items: QUICK ? 2 : 16, height: 16, width: 16, length: 32 };

const LEARNING_RATE = 1e-4;
/** What the first losses may differ from each other, as a part of the loss. */
const AGREEMENT = 1e-4;
/** Seconds of steps where there is no peer. */
const ALONE_SECONDS = 5;

const peer = await startPeer();
const rows: Row[] = [];
const golden = join(ROOT, 'test/golden/train_model.safetensors');
rows.push(await withModel(golden, ({ parts }) => measure('golden', parts.transformer!, golden, GOLDEN_BATCH)));
rows.push(await withRandomTransformer(SMALL_TRANSFORMER, (part, file) => measure('small', part, file, SMALL_BATCH)));
peer?.stop();
await publish({
  title: 'Training, seconds per step against PyTorch float32',
  rows,
  settings: { threads: THREADS, torch: peer?.torch ?? 'not installed' },
});

async function measure(
  name: string,
  part: PartWeights<TransformerConfig>,
  file: string,
  size: BatchSize,
): Promise<Row> {
  const { config } = part;
  const values = await readParameters('transformer', part);
  const segments = diffusionSegments({ config, transformer: wholePart('transformer', values) });
  const source = gradientSource(nodeRuntime({ threads: THREADS }), segments, isLearned);
  const trainer = createTrainer(source, { values, updater: threadedUpdater() });
  const shared = batchOf(config, size);
  const batch = {
    ...flowBatch(shared.latent!, shared.noise!, shared.sigma.data, config),
    context: shared.context!,
    pooled: shared.pooled!,
    corner: centreCorner(config.tableSize, size.height / config.patchSize, size.width / config.patchSize),
  };
  const call = () => trainer.step(batch, LEARNING_RATE);
  const row = {
    model: `${name} (${config.hiddenSize} wide, ${config.depth} blocks)`,
    batch: size.items,
    tokens: (size.height * size.width) / config.patchSize ** 2,
    text: size.length,
  };
  try {
    if (!peer) {
      const [, each] = await timeCalls(call, 2);
      const seconds = await timeCalls(call, callsFor(each!, QUICK ? 0 : ALONE_SECONDS));
      return { ...row, 'ours, s': rounded(median(seconds)) };
    }
    await peer.ask({ op: 'load', file });
    const messages = Object.fromEntries(Object.entries(shared).map(([key, tensor]) => [key, toMessage(tensor)]));
    const train = (calls: number) =>
      peer.ask<{ seconds: number[]; losses: number[] }>({ op: 'train', batch: messages, calls, rate: LEARNING_RATE });
    const difference = await largestLossDifference(call, train);
    if (!(difference < AGREEMENT)) throw new Error(`The losses of PyTorch and ours differ by ${difference}.`);
    const result = await takeTurns(
      (calls) => timeCalls(call, calls),
      async (calls) => (await train(calls)).seconds,
    );
    return {
      ...row,
      'ours, s': rounded(result.ours),
      'PyTorch, s': rounded(result.theirs),
      'PyTorch / ours': rounded(result.ratio),
      'of single turns': result.spread,
      'losses differ by': difference.toExponential(0),
    };
  } finally {
    await source.dispose();
  }
}

/** Over the first steps, so that gradients and optimiser are compared as well as the loss. */
async function largestLossDifference(
  ours: () => Promise<{ loss: number }>,
  theirs: (calls: number) => Promise<{ losses: number[] }>,
): Promise<number> {
  const { losses } = await theirs(3);
  let largest = 0;
  for (const expected of losses) largest = Math.max(largest, Math.abs((await ours()).loss / expected - 1));
  return largest;
}

function batchOf(
  config: TransformerConfig,
  { items, height, width, length }: BatchSize,
): Record<string, FloatTensor> & {
  sigma: FloatTensor;
} {
  const shape = [items, config.inChannels, height, width];
  return {
    latent: normalFloats(shape, 1),
    noise: normalFloats(shape, 2),
    sigma: floats(
      [items],
      Float32Array.from({ length: items }, (_, i) => (i + 0.5) / items),
    ),
    context: normalFloats([items, length, config.contextWidth], 3),
    pooled: normalFloats([items, config.pooledWidth], 4),
  };
}
