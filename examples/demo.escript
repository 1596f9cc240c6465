#!/usr/bin/env escript
%% -*- mode: erlang -*-
%% Saves a file into a cache and shows what happens: a save, a load, the same save again, and a
%% process that is killed in the middle of one.
%%
%%     make demo               64 MiB of random bytes
%%     make demo FILE=path     a file of yours, which is read and left as it is
%%
%% Everything is written below $TMPDIR (/tmp if that is not set) and removed at the end.
-mode(compile).

-include_lib("kernel/include/file.hrl").

-define(MIB, 1048576).
%% How long anything is waited for, in milliseconds.
-define(PATIENCE, 30000).
-define(STORE, demo_store).

main(Args) ->
    %% A server that does not start is told as an error, not as an exit.
    process_flag(trap_exit, true),
    speak_as_files_do(),
    try
        demo(Args)
    catch
        throw:{failed, Sentence} ->
            io:format(standard_error, "demo: ~ts~n", [Sentence]),
            halt(1)
    end.

%% Names of files are printed as the emulator reads them: in UTF-8, or byte for byte.
speak_as_files_do() ->
    Encoding = case file:native_name_encoding() of
        utf8 -> unicode;
        latin1 -> latin1
    end,
    ok = io:setopts(standard_io, [{encoding, Encoding}]),
    ok = io:setopts(standard_error, [{encoding, Encoding}]).

demo([]) ->
    is_built(),
    in_directory("random bytes, made for this", crypto:strong_rand_bytes(64 * ?MIB));
demo([File]) ->
    is_built(),
    in_directory(File, read(File));
demo(_More) ->
    fail("one file at a time: make demo FILE=path", []).

is_built() ->
    case code:ensure_loaded(erllama_cache_nif) of
        {module, _} -> ok;
        {error, Why} -> fail("the application does not load (~tp). Try: make demo", [Why])
    end.

read(File) ->
    case file:read_file_info(File) of
        {ok, #file_info{type = regular}} ->
            case file:read_file(File) of
                {ok, Payload} -> Payload;
                {error, Reason} -> fail("cannot read ~ts: ~ts", [File, reason(Reason)])
            end;
        {ok, #file_info{type = directory}} ->
            fail("~ts is a directory, and this saves one file", [File]);
        {ok, _} ->
            fail("~ts is not a regular file", [File]);
        {error, Reason} ->
            fail("cannot read ~ts: ~ts", [File, reason(Reason)])
    end.

in_directory(What, Payload) ->
    Parent = os:getenv("TMPDIR", "/tmp"),
    Unique = [os:getpid(), $., integer_to_list(erlang:system_time(millisecond))],
    Root = filename:join(Parent, lists:flatten(["erllama_cache_demo.", Unique])),
    ok = possible(file:make_dir(Root), "make the directory " ++ Root),
    try
        show(Root, What, Payload)
    after
        file:del_dir_r(Root)
    end.

show(Root, What, Payload) ->
    head("A store and a writer"),
    {ok, Store} = possible(
        erllama_cache_store:start_link(?STORE, #{root => Root}), "start a store in " ++ Root),
    {ok, Writer} = possible(
        erllama_cache_writer:start_link(#{host => erllama_cache_store}), "start the writer"),
    line("root", "~ts", [Root]),
    line("limit", "~b saves at a time", [erllama_cache_writer:max_concurrent()]),
    Key = save(Root, What, Payload),
    load(Key, Payload),
    save_again(Payload),
    kill_a_save(Root),
    head("At the end"),
    #{files := Files, saves := Saves, duplicates := Duplicates} = erllama_cache_store:info(?STORE),
    #{current := Held, owner_died := Died} = erllama_cache_writer:info(),
    line("store", "~b file, ~b saved, ~b already there", [Files, Saves, Duplicates]),
    line("slots held", "~b (~b came back because the owner had died)", [Held, Died]),
    Held =:= 0 orelse fail("a slot has not come back", []),
    ok = gen_server:stop(Writer),
    ok = gen_server:stop(Store).

save(Root, What, Payload) ->
    head("Save"),
    line("payload", "~ts", [What]),
    Meta = meta([1, 15043, 3186]),
    {Micros, Result} = timer:tc(fun() -> save_payload(Meta, Payload) end),
    {ok, Key} = possible(Result, "save " ++ amount(Payload)),
    Hex = string:lowercase(binary_to_list(binary:encode_hex(Key))),
    File = filename:join(Root, Hex ++ ".kvc"),
    line("size", "~ts", [amount(Payload)]),
    line("key", "~ts", [Hex]),
    line("file", "<root>/<key>.kvc, ~b bytes", [filelib:file_size(File)]),
    line("time", "~ts: checksummed, read back, synced, published", [rate(Payload, Micros)]),
    Key.

load(Key, Payload) ->
    head("Load it"),
    {Micros, Result} = timer:tc(fun() -> erllama_cache_store:load(?STORE, Key) end),
    case Result of
        {ok, #{tokens := Tokens}, Payload} ->
            line("time", "~ts: every byte checked", [rate(Payload, Micros)]),
            line("compared", "the ~b bytes of payload are the same", [byte_size(Payload)]),
            line("tokens", "~w", [[Token || <<Token:32/little>> <= Tokens]]);
        {ok, _Info, _Other} ->
            fail("what was loaded is not what was saved", []);
        miss ->
            fail("what was saved is not there", []);
        {error, Reason} ->
            fail("cannot load: ~ts", [reason(Reason)])
    end.

save_again(Payload) ->
    head("Save it again"),
    {Micros, Result} = timer:tc(fun() -> save_payload(meta([1, 15043, 3186]), Payload) end),
    case Result of
        {error, already_present} ->
            line("result", "{error, already_present}, after ~b us", [Micros]);
        Other ->
            fail("a second save of the same key answered ~tp", [Other])
    end.

kill_a_save(Root) ->
    head("Kill a process in the middle of a save"),
    {ok, Before} = file:list_dir(Root),
    kill_a_save(256, Root),
    {ok, After} = file:list_dir(Root),
    lists:sort(After) =:= lists:sort(Before) orelse fail("it left ~tp", [After -- Before]),
    line("left", "no file: ~b before, ~b after, none open", [length(Before), length(After)]).

%% A disk may be so fast that the save is over before anybody has looked: then a larger one.
kill_a_save(Mib, _Root) when Mib > 1024 ->
    fail("every save was over before it could be killed", []);
kill_a_save(Mib, Root) ->
    Payload = binary:copy(crypto:strong_rand_bytes(?MIB), Mib),
    Meta = meta([Mib]),
    {Pid, Monitor} = spawn_monitor(fun() -> exit({saved, save_payload(Meta, Payload)}) end),
    case until(fun() -> writing(Pid, Monitor) end, "the save to begin") of
        {over, Reason} ->
            saved_too_soon(Reason, Mib, Root);
        #{bytes := Bytes, ms := Ms} ->
            Open = open_files(Root),
            exit(Pid, kill),
            case timer:tc(fun() -> slot_is_back(Pid, Monitor) end) of
                {Micros, killed} ->
                    line("payload", "~ts, saved by ~p", [amount(Payload), Pid]),
                    line("held", "its slot for ~b ms, ~b bytes in flight", [Ms, Bytes]),
                    line("open", "~ts", [lists:join(", ", Open)]),
                    line("exit", "killed", []),
                    line("slot", "back after ~ts s, when its last write had ended",
                         [seconds(Micros)]),
                    true = until(fun() -> open_files(Root) =:= [] end, "its file to be closed");
                {_Micros, Reason} ->
                    saved_too_soon(Reason, Mib, Root)
            end
    end.

saved_too_soon({saved, {ok, Key}}, Mib, Root) ->
    ok = erllama_cache_store:delete(?STORE, Key),
    kill_a_save(2 * Mib, Root);
saved_too_soon({saved, Error}, Mib, _Root) ->
    possible(Error, "save " ++ integer_to_list(Mib) ++ " MiB");
saved_too_soon(Reason, _Mib, _Root) ->
    fail("the save ended by itself: ~tp", [Reason]).

%% The slot of a process that is in the middle of writing: in write_more the save has used up its
%% first slice of time and goes on.
writing(Pid, Monitor) ->
    receive
        {'DOWN', Monitor, process, Pid, Reason} -> {over, Reason}
    after 0 ->
        case {process_info(Pid, current_function), holders(Pid)} of
            {{current_function, {erllama_cache_nif, write_more, 4}}, [Row]} -> Row;
            _ -> false
        end
    end.

slot_is_back(Pid, Monitor) ->
    receive
        {'DOWN', Monitor, process, Pid, Reason} ->
            true = until(fun() -> erllama_cache_writer:current() =:= 0 end, "the slot"),
            Reason
    after ?PATIENCE ->
        fail("~p does not die", [Pid])
    end.

holders(Pid) ->
    [Row || #{pid := Holder} = Row <- erllama_cache_writer:holders(), Holder =:= Pid].

%% The files below a root that this process has open: one that has no name yet is seen nowhere else.
open_files(Root) ->
    Fds = filename:join(["/proc", os:getpid(), "fd"]),
    Names = case file:list_dir(Fds) of
        {ok, Listed} -> Listed;
        {error, _} -> []
    end,
    Base = filename:basename(Root) ++ "/",
    [
        "<root>/" ++ lists:nthtail(length(Base), Rest)
     || Name <- Names,
        {ok, Link} <- [file:read_link(filename:join(Fds, Name))],
        Rest <- [string:find(Link, Base)],
        Rest =/= nomatch
    ].

%% Asks again until the answer is not `false'.
until(Fun, What) ->
    until(Fun, What, erlang:monotonic_time(millisecond) + ?PATIENCE).

until(Fun, What, Deadline) ->
    case Fun() of
        false ->
            erlang:monotonic_time(millisecond) < Deadline orelse
                fail("waited ~b s in vain for ~ts", [?PATIENCE div 1000, What]),
            erlang:yield(),
            until(Fun, What, Deadline);
        Answer ->
            Answer
    end.

save_payload(Meta, Payload) ->
    erllama_cache_writer:save(?STORE, disk, Meta, Payload).

%% What a model's process would say of its state. Model, quantisation, parameters and tokens make
%% the key.
meta(Tokens) ->
    #{
        save_reason => cold,
        quant_bits => 16,
        quant_type => f16,
        fingerprint => crypto:hash(sha256, "the model"),
        fingerprint_mode => safe,
        ctx_params_hash => crypto:hash(sha256, "the context's parameters"),
        tokens => Tokens,
        context_size => 4096
    }.

%%% What is printed

head(Title) ->
    io:format("~n~ts~n", [Title]).

line(Name, Format, Args) ->
    io:format("  ~-12s" ++ Format ++ "~n", [Name | Args]).

amount(Payload) ->
    case byte_size(Payload) of
        Bytes when Bytes < ?MIB -> format("~b bytes", [Bytes]);
        Bytes -> format("~b bytes (~.1f MiB)", [Bytes, Bytes / ?MIB])
    end.

rate(Payload, Micros) ->
    %% Bytes per microsecond are megabytes per second.
    format("~ts s, ~.1f MB/s", [seconds(Micros), byte_size(Payload) / max(Micros, 1)]).

seconds(Micros) ->
    format("~.4f", [Micros / 1000000]).

format(Format, Args) ->
    lists:flatten(io_lib:format(Format, Args)).

%%% What may go wrong

possible({error, Reason}, What) -> fail("cannot ~ts: ~ts", [What, reason(Reason)]);
possible(Done, _What) -> Done.

reason(enospc) -> "the disk is full. TMPDIR=/another/directory makes it use another one";
reason(edquot) -> "the disk quota is used up. TMPDIR=/another/directory makes it use another one";
reason(Posix) when is_atom(Posix) ->
    case file:format_error(Posix) of
        "unknown POSIX error" ++ _ -> atom_to_list(Posix);
        Known -> Known
    end;
reason(Other) -> format("~tp", [Other]).

-spec fail(io:format(), [term()]) -> no_return().
fail(Format, Args) ->
    throw({failed, format(Format, Args)}).
