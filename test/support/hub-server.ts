/** A Hugging Face hub on this machine: its API for models, its file server, and the ways in which both can fail. */
import { createHash } from 'node:crypto';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { setTimeout } from 'node:timers/promises';

export interface HubModel {
  /** Contents by name. */
  readonly files: Readonly<Record<string, string | Uint8Array>>;
  /** Large files: named by their SHA-256, and given out by the file server (default: those called *.safetensors). */
  readonly large?: (name: string) => boolean;
  readonly card?: Readonly<Record<string, unknown>>;
  /** Needs a token, `good` with the licence accepted or another without. */
  readonly gated?: boolean;
  readonly commit?: string;
  /** What the listing says instead of the truth, by name. */
  readonly listed?: Readonly<Record<string, { readonly path?: string; readonly size?: number }>>;
}

/** What happens to requests whose path matches, so many times (default 1). */
export interface Fault {
  readonly path: RegExp;
  times?: number;
  readonly status?: number;
  readonly headers?: Readonly<Record<string, string>>;
  readonly body?: string;
  /** Bytes of the answer after which the connection breaks. */
  readonly breakAfter?: number;
  /** Bytes after which nothing more comes. */
  readonly stallAfter?: number;
  /** Milliseconds between the pieces, eight in number, that the answer comes in. */
  readonly dribble?: number;
  /** One byte of the answer is another one. */
  readonly corrupt?: boolean;
  readonly ignoreRange?: boolean;
  /** The answer begins so many bytes before the ones asked for. */
  readonly shiftRange?: number;
  /** The answer goes on for so many bytes after its end, and does not tell its length. */
  readonly extra?: number;
}

export interface SeenRequest {
  readonly path: string;
  readonly range: string | undefined;
  readonly token: string | undefined;
  /** Whether the file server got it. */
  readonly files: boolean;
}

export interface TestHub {
  readonly url: string;
  readonly models: Record<string, HubModel>;
  readonly faults: Fault[];
  readonly requests: SeenRequest[];
  close(): Promise<void>;
}

export const COMMIT = 'c0ffee'.padEnd(40, '0');
/** The token whose owner has accepted all licences. */
export const GOOD_TOKEN = 'hf_good';

export const sha256 = (content: string | Uint8Array) => createHash('sha256').update(content).digest('hex');
export const gitSha1 = (content: string | Uint8Array) =>
  createHash('sha1')
    .update(`blob ${Buffer.byteLength(content)}\0`)
    .update(content)
    .digest('hex');

export async function startHub(models: Record<string, HubModel>): Promise<TestHub> {
  const faults: Fault[] = [];
  const requests: SeenRequest[] = [];
  const faultFor = (path: string) => {
    const fault = faults.find(({ path: pattern, times = 1 }) => times > 0 && pattern.test(path));
    if (fault) fault.times = (fault.times ?? 1) - 1;
    return fault;
  };
  const see = ({ url = '', headers }: IncomingMessage, files: boolean) => {
    const path = decodeURIComponent(url);
    requests.push({ path, files, range: headers.range, token: headers.authorization?.replace('Bearer ', '') });
    return path;
  };

  // Large files come from another address, as from the hub's: a token must not get there.
  const fileServer = createServer((request, response) => {
    const path = see(request, true);
    const contents = Object.values(models).flatMap(({ files }) => Object.values(files));
    const content = contents.find((candidate) => path === `/${sha256(candidate)}`);
    if (content === undefined) refuse(response, 404);
    else send(request, response, content, faultFor(path));
  });
  const fileServerUrl = await listen(fileServer);

  const api = createServer((request, response) => {
    const path = see(request, false);
    const fault = faultFor(path);
    if (fault?.status) {
      response.writeHead(fault.status, fault.headers).end(fault.body ?? '');
      return;
    }
    const found = route(path, models);
    if (typeof found === 'number') refuse(response, found, found === 404 ? 'RepoNotFound' : undefined);
    else if (found.kind === 'json') send(request, response, JSON.stringify(found.json), fault);
    else answerFile(request, response, found, fault, fileServerUrl);
  });
  const url = await listen(api);
  const close = async () => {
    for (const server of [api, fileServer]) {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    }
  };
  return { url, models, faults, requests, close };
}

type Found = { kind: 'json'; json: unknown } | { kind: 'file'; model: HubModel; name: string };

function route(path: string, models: Readonly<Record<string, HubModel>>): Found | number {
  const [, name, revision, rest] =
    /^\/(?:api\/models\/)?(.+?)\/(?:revision|tree|resolve)\/([^/?]+)(?:\/([^?]*))?(?:\?.*)?$/.exec(path) ?? [];
  const model = models[name ?? ''];
  if (!model) return 404;
  const { commit = COMMIT } = model;
  if (path.includes('/revision/')) {
    if (revision !== 'main' && revision !== commit) return 404;
    const { card, gated = false } = model;
    const json = {
      _id: '1',
      id: name,
      sha: commit,
      gated: gated && 'auto',
      cardData: card,
      lastModified: '2024-10-29',
    };
    return { kind: 'json', json };
  }
  if (path.startsWith('/api/')) return { kind: 'json', json: listing(model) };
  return { kind: 'file', model, name: rest ?? '' };
}

const isLarge = ({ large = (name) => name.endsWith('.safetensors') }: HubModel, name: string) => large(name);

function listing(model: HubModel): unknown[] {
  const files = Object.entries(model.files).map(([name, content]) => {
    const { path = name, size = Buffer.byteLength(content) } = model.listed?.[name] ?? {};
    const entry = { type: 'file', path, size, oid: gitSha1(content) };
    return isLarge(model, name) ? { ...entry, lfs: { oid: sha256(content), size, pointerSize: 134 } } : entry;
  });
  return [{ type: 'directory', path: 'text_encoders', size: 0, oid: '0'.repeat(40) }, ...files];
}

function answerFile(
  request: IncomingMessage,
  response: ServerResponse,
  { model, name }: Found & { kind: 'file' },
  fault: Fault | undefined,
  fileServerUrl: string,
): void {
  const token = request.headers.authorization?.replace('Bearer ', '');
  const content = model.files[name];
  if (model.gated && token !== GOOD_TOKEN) refuse(response, token ? 403 : 401, 'GatedRepo');
  else if (content === undefined) refuse(response, 404, 'EntryNotFound');
  else if (isLarge(model, name)) {
    response
      .writeHead(302, { Location: `${fileServerUrl}/${sha256(content)}`, 'X-Linked-Etag': sha256(content) })
      .end();
  } else send(request, response, content, fault);
}

function refuse(response: ServerResponse, status: number, code?: string): void {
  response.writeHead(status, code ? { 'X-Error-Code': code } : {}).end('{"error":"refused"}');
}

function send(
  request: IncomingMessage,
  response: ServerResponse,
  content: string | Uint8Array,
  fault: Fault | undefined,
): void {
  if (fault?.status) {
    response.writeHead(fault.status, fault.headers).end(fault.body ?? '');
    return;
  }
  const whole = Buffer.from(content);
  const [, from] = (!fault?.ignoreRange && /^bytes=(\d+)-$/.exec(request.headers.range ?? '')) || [];
  const start = from === undefined ? 0 : Math.max(Number(from) - (fault?.shiftRange ?? 0), 0);
  const body = Buffer.from(whole.subarray(start));
  if (fault?.corrupt) body[body.length >> 1]! ^= 1;
  const headers: Record<string, string> = { 'Content-Type': 'application/json' };
  if (from !== undefined) headers['Content-Range'] = `bytes ${start}-${whole.length - 1}/${whole.length}`;
  if (!fault?.extra) headers['Content-Length'] = String(body.length);
  response.writeHead(from === undefined ? 200 : 206, { ...headers, ...fault?.headers });
  const cut = fault?.breakAfter ?? fault?.stallAfter;
  if (fault?.dribble) void dribble(response, body, fault.dribble);
  else if (cut === undefined) response.end(Buffer.concat([body, Buffer.alloc(fault?.extra ?? 0)]));
  else response.write(body.subarray(0, cut), () => fault?.breakAfter !== undefined && response.destroy());
}

async function dribble(response: ServerResponse, body: Uint8Array, gap: number): Promise<void> {
  const length = Math.ceil(body.length / 8);
  for (let start = 0; start < body.length; start += length) {
    await setTimeout(gap);
    response.write(body.subarray(start, start + length));
  }
  response.end();
}

async function listen(server: Server): Promise<string> {
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}
