// llama.cpp as a peer: makes a sequence's state from a prompt, and saves and loads it in llama.cpp's own
// way, `llama_state_seq_save_file` and `llama_state_seq_load_file`.
//
//     node llama.mjs DIRECTORY_OF_NODE_MODULES MODEL
//
// A command is a line, and so is its answer:
//
//     prompt TOKENS   forgets all and reads a prompt of so many tokens    -> ok MILLISECONDS
//     save PATH       saves the sequence's state                          -> ok NANOSECONDS
//     load PATH       loads it                                            -> ok NANOSECONDS
//
// It ends when its input does.
import {createRequire} from "node:module";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";
import path from "node:path";

const [packages, modelPath] = process.argv.slice(2);
const require = createRequire(path.join(packages, "package.json"));
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(require.resolve("node-llama-cpp")));

const LONGEST = 8192;
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath});
// Otherwise only the last 512 tokens of most layers would be there to be saved.
const context = await model.createContext({contextSize: LONGEST, swaFullCache: true});
const sequence = context.getSequence();
const words = model.tokenize(
    "The state of a language model after a long prompt takes seconds to compute, " +
    "and milliseconds to load from a disk on which it has been saved. ");

const commands = {
    async prompt(tokens) {
        await sequence.clearHistory();
        const prompt = Array.from({length: Number(tokens)}, (_, at) => words[at % words.length]);
        const begun = process.hrtime.bigint();
        await sequence.evaluateWithoutGeneratingNewTokens(prompt);
        return (process.hrtime.bigint() - begun) / 1000000n;
    },
    async save(file) {
        const begun = process.hrtime.bigint();
        await sequence.saveStateToFile(file);
        return process.hrtime.bigint() - begun;
    },
    async load(file) {
        const begun = process.hrtime.bigint();
        await sequence.loadStateFromFile(file, {acceptRisk: true});
        return process.hrtime.bigint() - begun;
    }
};

console.log("ready");
for await (const line of createInterface({input: process.stdin})) {
    const [command, argument] = line.split(/ (.*)/s);
    try {
        console.log(`ok ${await commands[command](argument)}`);
    } catch (error) {
        console.log(`error ${String(error).replaceAll("\n", " ")}`);
    }
}
process.exit(0);
