/** The PyTorch side of the comparisons: a process that is asked one thing at a time, in lines of JSON. */

import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { type FloatTensor, floats } from '../src/tensor/data.ts';
import { ROOT, THREADS } from './support.ts';

/** A float32 tensor in a message: values in little-endian base64. */
interface MessageTensor {
  readonly shape: readonly number[];
  readonly values: string;
}

export interface Peer {
  /** Version of PyTorch. */
  readonly torch: string;
  /** @throws Error with the peer's own message */
  ask<Reply>(request: Readonly<Record<string, unknown>>): Promise<Reply>;
  stop(): void;
}

const PYTHON = process.env.PYTHON ?? 'python3';
const INSTALL = 'pip install torch --index-url https://download.pytorch.org/whl/cpu';

/** Starts the peer; `undefined`, with a word on what is missing, where Python or PyTorch is not installed. */
export async function startPeer(): Promise<Peer | undefined> {
  const child = spawn(PYTHON, [join(ROOT, 'bench/peers/mmditx_torch.py'), String(THREADS)], {
    stdio: ['pipe', 'pipe', 'ignore'],
    env: { ...process.env, OMP_NUM_THREADS: String(THREADS), MKL_NUM_THREADS: String(THREADS) },
  });
  child.on('error', () => undefined);
  child.stdin.on('error', () => undefined);
  const replies = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const reply = async () => {
    const { value, done } = await replies.next();
    if (done) return undefined;
    return JSON.parse(value) as Record<string, unknown>;
  };
  const hello = await reply();
  if (!hello) {
    console.log(`Measured without PyTorch, which "${PYTHON}" does not have. To compare: ${INSTALL}`);
    return undefined;
  }
  return {
    torch: String(hello.torch),
    async ask<Reply>(request: Readonly<Record<string, unknown>>) {
      child.stdin.write(`${JSON.stringify(request)}\n`);
      const answer = await reply();
      if (!answer) throw new Error('The PyTorch peer ended unexpectedly.');
      if (answer.error) throw new Error(`The PyTorch peer failed: ${answer.error}`);
      return answer as Reply;
    },
    stop: () => void child.stdin.end(),
  };
}

export function toMessage({ shape, data }: FloatTensor): MessageTensor {
  return { shape, values: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString('base64') };
}

export function fromMessage({ shape, values }: MessageTensor): FloatTensor {
  return floats(shape, new Float32Array(Uint8Array.from(Buffer.from(values, 'base64')).buffer));
}

/** Largest difference of two tensors as a part of the largest value. */
export function relativeDifference(a: FloatTensor, b: FloatTensor): number {
  let [difference, largest] = [0, 0];
  for (const [i, value] of a.data.entries()) {
    difference = Math.max(difference, Math.abs(value - b.data[i]!));
    largest = Math.max(largest, Math.abs(value));
  }
  return difference / largest;
}

export type { MessageTensor };
