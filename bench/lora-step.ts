/**
 * One step of a LoRA (rank 16 on attention and MLPs of all blocks, batch 1, 256 x 256 pixels, encoded inputs) on the
 * transformer of full size with random weights: seconds and peak memory, with and without checkpointing, beside PyTorch.
 * Each variant runs in a process of its own.
 */

import { join } from 'node:path';
import { centreCorner } from '../src/models/mmditx.ts';
import { nodeRuntime } from '../src/runtime/node.node.ts';
import { floats } from '../src/tensor/data.ts';
import { stepRandom } from '../src/training/batches.ts';
import { checkTrainConfig, type LoraConfig } from '../src/training/config.ts';
import { gradientSource } from '../src/training/gradients.ts';
import { flowBatch } from '../src/training/loss.ts';
import { diffusionSegments } from '../src/training/objective.ts';
import { adaptedLayers, adaptedPart, initialLora } from '../src/training/parts.ts';
import { createTrainer } from '../src/training/trainer.ts';
import type { Precision } from '../src/weights/convert.ts';
import { convertParts } from '../src/weights/converted.node.ts';
import { FULL_SIZE_FOLDER, fullSizeFiles } from './full-size.ts';
import { normalFloats, withModel } from './models.ts';
import { startPeer, toMessage } from './peer.ts';
import { median, publish, QUICK, type Row, rounded, runNode, THREADS, timeCalls } from './support.ts';

const RANK = 16;
/** 256 x 256 pixels. */
const SIDE = 32;
/** Context tokens: both CLIPs' and T5's 77. */
const TEXT_TOKENS = 154;
const STEPS = QUICK ? 1 : 5;

/** Blocks of a segment; 0 keeps all activations. */
const VARIANTS: readonly { precision: Precision; checkpointing: number }[] = QUICK
  ? [{ precision: 'int8', checkpointing: 4 }]
  : [
      { precision: 'fp16', checkpointing: 0 },
      { precision: 'fp16', checkpointing: 4 },
      { precision: 'int8', checkpointing: 0 },
      { precision: 'int8', checkpointing: 4 },
    ];

interface Report {
  readonly seconds: number;
  readonly losses: readonly number[];
}

const [, , child, ...given] = process.argv;
if (child === 'ours') await stepOurs(given[0] as Precision, Number(given[1]));
else if (child === 'PyTorch') await stepPyTorch(given[0] === '1');
else await compare();

async function compare(): Promise<void> {
  const script = import.meta.filename ?? process.argv[1]!;
  const rows: Row[] = [];
  const measure = async (who: string, args: readonly string[], columns: Row) => {
    const { peakBytes, stdout } = await runNode([script, who, ...args], { typescript: true });
    const {
      seconds,
      losses,
      peak = peakBytes,
    } = JSON.parse(stdout.trim().split('\n').at(-1)!) as Report & { peak?: number };
    rows.push({
      ...columns,
      's a step': rounded(seconds),
      'peak memory, GiB': rounded(peak / 2 ** 30),
      'first loss': rounded(losses[0]!, 5),
      'last loss': rounded(losses.at(-1)!, 5),
    });
  };
  for (const { precision, checkpointing } of VARIANTS) {
    const columns = {
      what: `ours, ${precision} weights`,
      checkpointing: checkpointing ? `${checkpointing} blocks` : 'none',
    };
    await measure('ours', [precision, String(checkpointing)], columns);
  }
  const peer = await startPeer();
  peer?.stop();
  if (peer) {
    for (const checkpointing of [false, true]) {
      const columns = { what: 'PyTorch, bf16 weights', checkpointing: checkpointing ? '1 block' : 'none' };
      await measure('PyTorch', [checkpointing ? '1' : '0'], columns);
    }
  }
  await publish({
    title: `A LoRA step on the transformer of full size: rank ${RANK}, batch 1, 256 x 256 pixels, cached inputs`,
    rows,
    settings: { threads: THREADS, torch: peer?.torch ?? 'not installed', text: TEXT_TOKENS },
  });
}

function lossInputs(contextWidth: number, pooledWidth: number, channels: number) {
  const shape = [1, channels, SIDE, SIDE];
  return {
    latent: normalFloats(shape, 1),
    noise: normalFloats(shape, 2),
    sigma: floats([1], [0.6]),
    context: normalFloats([1, TEXT_TOKENS, contextWidth], 3),
    pooled: normalFloats([1, pooledWidth], 4),
  };
}

async function stepOurs(precision: Precision, checkpointing: number): Promise<void> {
  const [file] = await fullSizeFiles();
  await withModel(file!, async (checkpoint) => {
    const folder = join(FULL_SIZE_FOLDER, 'converted');
    const converted = await convertParts(checkpoint, precision === 'fp16' ? [] : ['transformer'], precision, {
      folder,
    });
    const part = converted.checkpoint.parts.transformer!;
    const config = loraConfig();
    const layers = adaptedLayers('transformer', part, config);
    const values = initialLora(layers, config, { transformer: part }, stepRandom(0));
    const transformer = adaptedPart('transformer', part, { config, layers });
    const segments = diffusionSegments({
      config: part.config,
      transformer,
      ...(checkpointing > 0 && { checkpointing }),
    });
    const source = gradientSource(nodeRuntime({ threads: THREADS }), segments, (name) => values.has(name));
    const trainer = createTrainer(source, { values });
    const { latent, noise, sigma, context, pooled } = lossInputs(
      part.config.contextWidth,
      part.config.pooledWidth,
      part.config.inChannels,
    );
    const grid = SIDE / part.config.patchSize;
    const batch = {
      ...flowBatch(latent, noise, sigma.data, part.config),
      context,
      pooled,
      corner: centreCorner(part.config.tableSize, grid, grid),
    };
    const losses: number[] = [];
    const call = async () => void losses.push((await trainer.step(batch, 1e-3)).loss);
    await call();
    const report: Report = { seconds: median(await timeCalls(call, STEPS)), losses };
    console.log(JSON.stringify(report));
    await source.dispose();
    await converted.close();
  });
}

async function stepPyTorch(checkpointing: boolean): Promise<void> {
  const [file] = await fullSizeFiles();
  const peer = await startPeer();
  await peer!.ask({ op: 'load', file, dtype: 'bfloat16' });
  const inputs = lossInputs(4096, 2048, 16);
  const batch = Object.fromEntries(Object.entries(inputs).map(([key, tensor]) => [key, toMessage(tensor)]));
  const step = (calls: number) =>
    peer!.ask<{ seconds: number[]; losses: number[] }>({ op: 'lora', batch, rank: RANK, checkpointing, calls });
  const first = await step(1);
  const { seconds, losses } = await step(STEPS);
  const { peak } = await peer!.ask<{ peak: number }>({ op: 'memory' });
  peer!.stop();
  console.log(JSON.stringify({ seconds: median(seconds), losses: [...first.losses, ...losses], peak }));
}

/** The defaults of a configuration. */
function loraConfig(): LoraConfig {
  const [stage] = checkTrainConfig(
    {
      name: 'bench',
      model: 'none',
      data: { none: { path: 'none', sizes: [256] } },
      stages: [
        {
          name: 'lora',
          train: 'diffusion',
          transformer: 'lora',
          steps: 1,
          learningRate: { peak: 1 },
          lora: { rank: RANK },
        },
      ],
    },
    'bench',
  ).stages;
  if (stage?.train !== 'diffusion') throw new Error('The configuration has no diffusion stage.');
  return stage.lora;
}
