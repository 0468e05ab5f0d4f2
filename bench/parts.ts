/** Each network by itself, in a process of its own: seconds per call and peak memory. */

import { fileURLToPath } from 'node:url';
import { loadAutoencoder } from '../src/models/autoencoder.ts';
import { vaeDownscale } from '../src/models/config.ts';
import { loadClip, loadT5 } from '../src/models/text-encoders.ts';
import { loadTransformer } from '../src/models/transformer.ts';
import { nodeRuntime } from '../src/runtime/node.node.ts';
import { torchGenerator } from '../src/sampling/noise.ts';
import type { TensorData } from '../src/tensor/data.ts';
import type { Checkpoint } from '../src/weights/checkpoint.ts';
import { GOLDEN, normalFloats, SMALL, transformerInputs, withModel } from './models.ts';
import { callsFor, MIB, median, publish, QUICK, type Row, rounded, runNode, THREADS, timeCalls } from './support.ts';

/** A part ready to be called once. */
interface Prepared {
  /** What it is given. */
  readonly input: string;
  call(): Promise<unknown>;
}

/** `side` is the picture's, in pixels. */
const PARTS: Readonly<Record<string, (parts: Checkpoint['parts'], side: number) => Prepared>> = {
  'CLIP-L': ({ clipL }) => prepareText(loadClip(nodeRuntime({ threads: THREADS }), clipL!), clipL!.config.positions),
  'CLIP-G': ({ clipG }) => prepareText(loadClip(nodeRuntime({ threads: THREADS }), clipG!), clipG!.config.positions),
  T5: ({ t5 }) => prepareText(loadT5(nodeRuntime({ threads: THREADS }), t5!), t5!.config.tokens),
  transformer({ transformer, vae, clipL, t5 }, side) {
    const { config, velocities } = loadTransformer(nodeRuntime({ threads: THREADS }), transformer!);
    const tokens = (side / vaeDownscale(vae!.config) / config.patchSize) ** 2;
    const length = clipL!.config.positions + t5!.config.tokens;
    const inputs = transformerInputs(config, tokens, length);
    return {
      input: `${tokens} + ${length} tokens`,
      call: () => velocities(inputs.latent, inputs.timesteps, [inputs]),
    };
  },
  'VAE encoder'({ vae }, side) {
    const { encode } = loadAutoencoder(nodeRuntime({ threads: THREADS }), vae!);
    const image = normalFloats([1, vae!.config.imageChannels, side, side]);
    return { input: `${side} x ${side} pixels`, call: () => encode(image) };
  },
  'VAE decoder'({ vae }, side) {
    const { config, decode } = loadAutoencoder(nodeRuntime({ threads: THREADS }), vae!);
    const small = side / vaeDownscale(config);
    const latent = normalFloats([1, config.latentChannels, small, small]);
    return { input: `${side} x ${side} pixels`, call: () => decode(latent) };
  },
};

function prepareText(
  { config, encode }: { config: { vocabSize: number }; encode(ids: TensorData): Promise<unknown> },
  length: number,
): Prepared {
  const data = Int32Array.from(torchGenerator(1).integers(0, config.vocabSize, length));
  const ids: TensorData = { dtype: 'int32', shape: [1, length], data };
  return { input: `${length} tokens`, call: () => encode(ids) };
}

/** The golden model is for 384 pixels at most, the small one was trained at 128. */
const MODELS = [
  { model: 'golden', file: GOLDEN, side: 256 },
  ...(SMALL ? [{ model: 'small', file: SMALL, side: 128 }] : []),
];

/** Seconds of calls per part. */
const PART_SECONDS = QUICK ? 0 : 2;

interface PartReport {
  readonly input: string;
  readonly first: number;
  readonly seconds: number;
  readonly emptyBytes: number;
}

/** In a child: loads one part and calls it. */
async function measurePart(part: string, file: string, side: number): Promise<PartReport> {
  const emptyBytes = process.memoryUsage.rss();
  return withModel(file, async ({ parts }) => {
    const { input, call } = PARTS[part]!(parts, side);
    const [first, second] = (await timeCalls(call, 2)) as [number, number];
    const seconds = median(await timeCalls(call, callsFor(second, PART_SECONDS)));
    return { input, first, seconds, emptyBytes };
  });
}

const [, , part, file, side] = process.argv;
if (part) {
  console.log(JSON.stringify(await measurePart(part, file!, Number(side))));
} else {
  const rows: Row[] = [];
  for (const { model, file, side } of MODELS) {
    for (const name of Object.keys(PARTS)) {
      const script = fileURLToPath(import.meta.url);
      const { stdout, peakBytes } = await runNode([script, name, file, String(side)], { typescript: true });
      const report = JSON.parse(stdout) as PartReport;
      rows.push({
        model,
        part: name,
        input: report.input,
        'load and first call, s': rounded(report.first),
        'call, s': rounded(report.seconds),
        'peak memory, MiB': Math.round(peakBytes / MIB),
        'of it before loading, MiB': Math.round(report.emptyBytes / MIB),
      });
    }
  }
  await publish({ title: 'Parts, seconds per call and memory', rows, settings: { threads: THREADS } });
  if (!SMALL) console.log('The small model is not there; models/small/README.md says how to train it.');
}
