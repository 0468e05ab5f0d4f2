/** Where the time goes: ONNX Runtime's own profile of the transformer and the VAE's decoder, by operator. */

import { loadAutoencoder } from '../src/models/autoencoder.ts';
import { type TransformerConfig, type VaeConfig, vaeDownscale } from '../src/models/config.ts';
import { loadTransformer } from '../src/models/transformer.ts';
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
} from './models.ts';
import { type OperatorTime, profileOperators, type Subject } from './operators.ts';
import { publish, QUICK, type Row, rounded, THREADS } from './support.ts';

/** Runs that count, after one that does not. */
const RUNS = QUICK ? 1 : 10;
/** Operators listed; the rest is one row. */
const LISTED = 8;

/** Profiles something that is loaded with a runtime, run several times and disposed of. */
async function profile(subject: string, load: (runtime: Runtime) => Subject): Promise<Row[]> {
  const { operators, total } = await profileOperators(load, RUNS);
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
