/** One forward pass of the transformer against PyTorch (float32, eager) on the same weights, taking turns. */

import { join } from 'node:path';
import type { TransformerConfig } from '../src/models/config.ts';
import { loadTransformer } from '../src/models/transformer.ts';
import { nodeRuntime } from '../src/runtime/node.node.ts';
import { floats } from '../src/tensor/data.ts';
import type { PartWeights } from '../src/weights/checkpoint.ts';
import { GOLDEN, MIDDLE_TRANSFORMER, SMALL_TRANSFORMER, transformerInputs, withRandomTransformer } from './models.ts';
import { fromMessage, type MessageTensor, type Peer, relativeDifference, startPeer, toMessage } from './peer.ts';
import { callsFor, median, publish, QUICK, ROOT, type Row, rounded, THREADS, takeTurns, timeCalls } from './support.ts';

interface Case {
  readonly name: string;
  readonly config: TransformerConfig;
  /** Context tokens: both CLIPs' and T5's. */
  readonly length: number;
  readonly tokens: readonly number[];
}

const CASES: readonly Case[] = [
  { name: 'small', config: SMALL_TRANSFORMER, length: 32, tokens: [64, 256, 1024, 4096] },
  { name: 'middle', config: MIDDLE_TRANSFORMER, length: 154, tokens: [256, 1024] },
];
const cases = QUICK ? CASES.slice(0, 1).map((entry) => ({ ...entry, tokens: [64] })) : CASES;

/** What the peer may differ from the golden outputs. */
const GOLDEN_TOLERANCE = 1e-5;
/** What both may differ from each other, as a part of the largest value. */
const AGREEMENT = 1e-4;
/** Seconds of calls where there is no peer. */
const ALONE_SECONDS = 3;

const peer = await startPeer();
if (peer) await checkPeer(peer);
const rows: Row[] = [];
for (const { name, config, length, tokens } of cases) {
  await withRandomTransformer(config, async (part, file) => {
    await peer?.ask({ op: 'load', file });
    for (const count of tokens) rows.push(await measure(name, part, count, length));
  });
}
peer?.stop();
await publish({
  title: 'Transformer, seconds per forward pass against PyTorch float32',
  rows,
  settings: { threads: THREADS, torch: peer?.torch ?? 'not installed' },
});

async function measure(
  name: string,
  part: PartWeights<TransformerConfig>,
  tokens: number,
  length: number,
): Promise<Row> {
  const { latent, timesteps, context, pooled } = transformerInputs(part.config, tokens, length);
  const transformer = loadTransformer(nodeRuntime({ threads: THREADS }), part);
  const pass = { context, pooled };
  const call = () => transformer.velocities(latent, timesteps, [pass]);
  const size = { model: `${name} (${part.config.hiddenSize} wide, ${part.config.depth} blocks)`, tokens, text: length };
  try {
    const [velocity] = await call();
    if (!peer) {
      const seconds = await timeCalls(call, callsFor((await timeCalls(call, 1))[0]!, QUICK ? 0 : ALONE_SECONDS));
      return { ...size, 'ours, s': rounded(median(seconds)) };
    }
    const inputs = { latent, timestep: floats([1], timesteps), context, pooled };
    const messages = Object.fromEntries(Object.entries(inputs).map(([key, tensor]) => [key, toMessage(tensor)]));
    const forward = (calls: number) =>
      peer.ask<{ seconds: number[]; velocity: MessageTensor }>({ op: 'forward', inputs: messages, calls });
    const difference = relativeDifference(fromMessage((await forward(1)).velocity), velocity!);
    if (!(difference < AGREEMENT)) throw new Error(`PyTorch and we differ by ${difference} at ${tokens} tokens.`);
    const result = await takeTurns(
      (calls) => timeCalls(call, calls),
      async (calls) => (await forward(calls)).seconds,
    );
    return {
      ...size,
      'ours, s': rounded(result.ours),
      'PyTorch, s': rounded(result.theirs),
      'PyTorch / ours': rounded(result.ratio),
      'of single turns': result.spread,
      difference: difference.toExponential(0),
    };
  } finally {
    await transformer.dispose();
  }
}

/** A peer that computes something else would be measured for nothing. */
async function checkPeer(peer: Peer): Promise<void> {
  await peer.ask({ op: 'load', file: GOLDEN });
  const file = join(ROOT, 'test/golden/mmdit.safetensors');
  const { errors } = await peer.ask<{ errors: Record<string, number> }>({ op: 'golden', file });
  const wrong = Object.entries(errors).find(([, error]) => !(error < GOLDEN_TOLERANCE));
  if (wrong) throw new Error(`The PyTorch peer is off by ${wrong[1]} in golden case ${wrong[0]}.`);
}
