%% What runs in the guest of `make crash': saves without pause, and loads what has survived.
%%
%% guest.py starts it and speaks with it over standard input and output: a line with a request, a
%% line with the answer. During `run' it is this side that speaks, in the lines that model.py
%% lists, each beginning with `!', and guest.py that answers: by then the line has left the guest.
%% So a delete is on record before it happens, and a success before anything else is done.
%%
%% There are two roots. `a' has two stores on it, so that two saves of one key can meet on the
%% disk; `b' has a bound, and evicts. Keys of the one are made of tokens, those of the other of
%% text, so that there are files of both versions.
%%
%% Half of the saves are in line, half behind their callers. Of the latter both are on record: the
%% answer, which promises nothing that outlives the VM, and the flush, after which they are promised
%% like the others.
-module(erllama_cache_crash).

-export([main/0]).

-define(SAVERS_OF_A, 3).
%% Enough for all savers.
-define(SLOTS, 16).
%% How many payloads a saver of `a' keeps before it deletes one.
-define(LIVE, 6).

-record(saver, {
    root :: string(),
    %% Numbers are never used again, so that what is found tells when it was saved.
    next :: atomics:atomics_ref(),
    last :: pos_integer() | infinity,
    live = [] :: [pos_integer()],
    %% What a power cut has left damaged.
    damaged = [] :: [pos_integer()]
}).

-spec main() -> no_return().
main() ->
    [Dir, MaxBytes, KeyedByOfA] = init:get_plain_arguments(),
    ok = persistent_term:put(?MODULE, list_to_existing_atom(KeyedByOfA)),
    {ok, _} = application:ensure_all_started(erllama_cache_nif),
    {ok, _} = erllama_cache_writer:start_link(#{
        host => erllama_cache_store, max_concurrent => ?SLOTS,
        write_behind => #{reasons => [continued], max => max_pending()}
    }),
    serve(Dir, list_to_integer(MaxBytes)).

serve(Dir, MaxBytes) ->
    case string:lexemes(line(), " ") of
        ["start"] ->
            say(start(Dir, MaxBytes));
        ["stop"] ->
            ok = lists:foreach(fun gen_server:stop/1, stores()),
            %% What these processes still hold of a root keeps its file system mounted.
            lists:foreach(fun garbage_collect/1, processes()),
            say("stopped");
        ["name", Root, N] ->
            say(hex(key(Root, list_to_integer(N))));
        ["load", Root, N] ->
            say(load(Root, list_to_integer(N)));
        ["run", Seed, First, Last, Busy | There] ->
            Saves = {list_to_integer(First), last(Last)},
            run(Dir, list_to_integer(Seed), Saves, Busy =:= "busy", There),
            say("done")
    end,
    serve(Dir, MaxBytes).

last("infinity") -> infinity;
last(Number) -> list_to_integer(Number).

line() ->
    case io:get_line("") of
        eof -> halt(0);
        Line when is_list(Line) -> string:trim(Line)
    end.

say(Line) ->
    io:put_chars([Line, $\n]).

stores() -> [kv_a, kv_a2, kv_b].

start(Dir, MaxBytes) ->
    A = #{root => filename:join(Dir, "a"), keyed_by => keyed_by("a")},
    B = #{root => filename:join(Dir, "b"), keyed_by => keyed_by("b"), max_bytes => MaxBytes},
    Started = [erllama_cache_store:start_link(Store, Options)
               || {Store, Options} <- lists:zip(stores(), [A, A, B])],
    case [Error || {error, Error} <- Started] of
        [] -> "started";
        Errors -> one_line("~p", [Errors])
    end.

%%% Payloads

store("a") -> kv_a;
store("b") -> kv_b.

keyed_by("a") -> persistent_term:get(?MODULE);
keyed_by("b") -> other(keyed_by("a")).

other(tokens) -> text;
other(text) -> tokens.

version(tokens) -> 1;
version(text) -> 2.

meta(Root, N) ->
    #{
        save_reason => cold, quant_bits => 16, quant_type => f16,
        fingerprint => crypto:hash(sha256, Root), fingerprint_mode => safe,
        ctx_params_hash => <<2:256>>, tokens => lists:seq(N, N + N rem 100),
        prompt_text => binary:copy(integer_to_binary(N), 1 + N rem 100), context_size => 4096
    }.

key(Root, N) ->
    {ok, Key} = erllama_cache_store:key(meta(Root, N), #{keyed_by => keyed_by(Root)}),
    Key.

hex(Key) ->
    string:lowercase(binary_to_list(binary:encode_hex(Key))).

%% Nothing has to be remembered of a payload but its number.
payload(Root, N) ->
    <<Secret:16/binary, _/binary>> = crypto:hash(sha256, [Root, <<N:64>>]),
    Zeros = <<0:(payload_size(Root, N))/unit:8>>,
    crypto:crypto_one_time(aes_128_ctr, Secret, <<0:128>>, Zeros, true).

%% From 4 KiB up, small ones as often as large ones. Beyond 8 MiB a save writes back on its way.
payload_size("a", N) when N rem 32 =:= 7 -> (9 bsl 20) + N;
payload_size("a", N) -> log_uniform("a", N, 1 bsl 20);
payload_size("b", N) -> log_uniform("b", N, 256 bsl 10).

log_uniform(Root, N, Max) ->
    Min = 4096,
    trunc(Min * math:pow(Max / Min, erlang:phash2({Root, N}, 10000) / 9999)).

load(Root, N) ->
    case erllama_cache_store:load(store(Root), key(Root, N)) of
        {ok, #{version := Version}, Payload} ->
            case Payload =:= payload(Root, N) andalso Version =:= version(keyed_by(Root)) of
                true -> "right";
                false -> "wrong"
            end;
        miss -> "miss";
        {error, {corrupt, _}} -> "corrupt";
        {error, Reason} -> one_line("error ~p", [Reason])
    end.

one_line(Format, Args) ->
    string:join(string:lexemes(lists:flatten(io_lib:format(Format, Args)), "\n "), " ").

%%% Saving

run(Dir, Seed, {First, Last}, Busy, There) ->
    %% In half of the runs what is pending has to wait for a slot, so that it meets the cut. In the
    %% others saves meet each other.
    ok = erllama_cache_writer:set_max_concurrent(lists:nth(1 + Seed rem 2, [1, ?SLOTS])),
    Next = atomics:new(1, []),
    ok = atomics:put(Next, 1, First),
    Numbers = [string:to_integer(N) || N <- There],
    Of = fun(I, Mark) -> [N || {N, M} <- Numbers, M =:= Mark, N rem ?SAVERS_OF_A =:= I] end,
    Savers = [#saver{root = "a", next = Next, last = Last, live = Of(I, ""), damaged = Of(I, "!")}
              || I <- lists:seq(0, ?SAVERS_OF_A - 1)] ++
        [#saver{root = "b", next = Next, last = Last}],
    Self = self(),
    Neighbours = [spawn_link(fun() -> neighbour(filename:join(Dir, "neighbour")) end) || Busy],
    Pids = [spawn_link(fun() ->
                rand:seed(exsss, {Seed, First, I}),
                saver(Self, Dir, Saver)
            end) || {I, Saver} <- lists:zip(lists:seq(0, ?SAVERS_OF_A), Savers)],
    relay(Pids, totals()),
    [begin
         Neighbour ! {stop, Self},
         receive {stopped, Neighbour} -> ok end
     end || Neighbour <- Neighbours],
    ok.

%% Somebody else on the same file system: commits its journal at moments that no save has chosen.
%% That shows what is done in the wrong order, and hides a sync that is missing: so there is one in
%% half of the runs.
neighbour(Path) ->
    {ok, File} = file:open(Path, [write, raw]),
    neighbour_writes(File).

neighbour_writes(File) ->
    receive
        {stop, From} ->
            ok = file:close(File),
            From ! {stopped, self()}
    after rand:uniform(30) ->
        ok = file:write(File, "more"),
        ok = file:sync(File),
        neighbour_writes(File)
    end.

%% One report at a time, and the next step of whoever made it only when it is out.
relay([], _Totals) ->
    ok;
relay(Pids, Totals) ->
    receive
        {report, Pid, Line} ->
            say_and_wait(Line),
            Pid ! reported,
            Now = totals(),
            [say_and_wait(one_line("C ~s ~b", [What, New - Old]))
             || {{What, Old}, {What, New}} <- lists:zip(Totals, Now), New > Old],
            relay(Pids, Now);
        {ended, Pid} ->
            relay(lists:delete(Pid, Pids), Totals)
    end.

say_and_wait(Line) ->
    say(["! ", Line]),
    "ok" = line().

totals() ->
    #{adoptions := Adopted, replacements := Replaced} = erllama_cache_counts:read(),
    #{evictions := Evicted} = erllama_cache_store:info(kv_b),
    [{"adopted", Adopted}, {"replaced", Replaced}, {"evicted", Evicted}].

report(Relay, Format, Args) ->
    Relay ! {report, self(), one_line(Format, Args)},
    receive reported -> ok end.

saver(Relay, Dir, #saver{next = Next, last = Last} = Saver) ->
    case atomics:get(Next, 1) > Last of
        true -> Relay ! {ended, self()};
        false -> saver(Relay, Dir, step(Relay, Dir, Saver))
    end.

step(Relay, _Dir, #saver{root = "b"} = Saver) ->
    %% What of these is live, its store decides.
    _ = save_new(Relay, [kv_b], Saver),
    Saver;
step(Relay, _Dir, #saver{damaged = [N | Damaged], live = Live} = Saver) ->
    save(Relay, how(), [kv_a], "a", [N]),
    Saver#saver{damaged = Damaged, live = [N | Live]};
step(Relay, Dir, #saver{root = "a", live = Live} = Saver) ->
    case rand:uniform(20) of
        _ when length(Live) > ?LIVE -> delete(Relay, Saver);
        Dice when Dice =< 10; Live =:= [] -> save_new(Relay, [kv_a], Saver);
        Dice when Dice =< 14 -> save_new(Relay, [kv_a, kv_a2], Saver);
        Dice when Dice =< 15 -> delete(Relay, Saver);
        Dice when Dice =< 16 -> delete_and_save(Relay, Saver);
        Dice when Dice =< 18 -> damage_and_save(Relay, Dir, Saver);
        _ -> look(Relay, Saver)
    end.

fresh(#saver{next = Next}) ->
    atomics:add_get(Next, 1, 1) - 1.

any(#saver{live = Live}) ->
    lists:nth(rand:uniform(length(Live)), Live).

save_new(Relay, Stores, #saver{root = Root, live = Live} = Saver) ->
    How = how(),
    New = case How of
        in_line -> [fresh(Saver)];
        behind -> [fresh(Saver) || _ <- lists:seq(1, rand:uniform(max_pending(Root)))]
    end,
    save(Relay, How, Stores, Root, New),
    Saver#saver{live = New ++ Live}.

delete(Relay, #saver{live = Live} = Saver) ->
    N = any(Saver),
    delete_one(Relay, N),
    Saver#saver{live = lists:delete(N, Live)}.

delete_and_save(Relay, Saver) ->
    N = any(Saver),
    delete_one(Relay, N),
    save(Relay, how(), [kv_a], "a", [N]),
    Saver.

delete_one(Relay, N) ->
    report(Relay, "D a ~b", [N]),
    case erllama_cache_store:delete(kv_a, key("a", N)) of
        ok -> report(Relay, "C deleted 1", []);
        Other -> report(Relay, "E delete a ~b: ~p", [N, Other])
    end.

damage_and_save(Relay, Dir, Saver) ->
    N = any(Saver),
    report(Relay, "G a ~b", [N]),
    ok = flip_last_byte(filename:join([Dir, "a", hex(key("a", N)) ++ ".kvc"])),
    case load("a", N) of
        "corrupt" -> save(Relay, how(), [kv_a], "a", [N]);
        Other -> report(Relay, "E load a ~b, damaged: ~s", [N, Other])
    end,
    Saver.

%% A file that a power cut left damaged is damaged for good.
flip_last_byte(Path) ->
    {ok, File} = file:open(Path, [read, write, raw, binary]),
    {ok, End} = file:position(File, eof),
    {ok, <<Byte>>} = file:pread(File, End - 1, 1),
    ok = file:pwrite(File, End - 1, <<(Byte bxor 1)>>),
    file:close(File).

look(Relay, Saver) ->
    N = any(Saver),
    case load("a", N) of
        "right" -> report(Relay, "C loaded 1", []);
        Other -> report(Relay, "E load a ~b: ~s", [N, Other])
    end,
    Saver.

%% How many saves of one saver are pending at most. In `b' they leave room for half of its bound:
%% model.py relies on that.
max_pending("a") -> 4;
max_pending("b") -> 2.

%% The same of all savers. Those of `a' may save each key in both of its stores.
max_pending() ->
    ?SAVERS_OF_A * 2 * max_pending("a") + max_pending("b").

how() ->
    lists:nth(rand:uniform(2), [in_line, behind]).

save(Relay, in_line, Stores, Root, [N]) ->
    save_in_line(Relay, Stores, Root, N);
save(Relay, behind, Stores, Root, Ns) ->
    Begun = [begun(Relay, Root, N, continued) || N <- Ns],
    Answers = [save_behind(Save, Stores, Root, N) || {N, Save} <- lists:zip(Ns, Begun)],
    [begin
         answered(Relay, "A", Root, N, Results),
         IsThere orelse report(Relay, "E load ~s ~b, behind", [Root, N])
     end || {N, {Results, IsThere}} <- lists:zip(Ns, Answers)],
    ok = erllama_cache_writer:flush(infinity),
    case erllama_cache_writer:info() of
        #{dropped := 0} -> [report(Relay, "F ~s ~b", [Root, N]) || N <- Ns];
        #{dropped := Dropped} -> report(Relay, "E flush: ~b saves dropped", [Dropped])
    end.

%% The results, and whether a load gives the payload, be the save pending or not.
save_behind({Save, Payload}, Stores, Root, N) ->
    Results = [Save(Store) || Store <- Stores],
    IsThere = case erllama_cache_store:load(store(Root), key(Root, N)) of
        {ok, _Info, Payload} -> true;
        _ -> false
    end,
    {Results, IsThere}.

save_in_line(Relay, [Mine | Others], Root, N) ->
    {Save, _Payload} = begun(Relay, Root, N, cold),
    Self = self(),
    Refs = [begin
                Ref = make_ref(),
                spawn_link(fun() -> Self ! {Ref, Save(Other)} end),
                Ref
            end || Other <- Others],
    Results = [Save(Mine) | [receive {Ref, Result} -> Result end || Ref <- Refs]],
    answered(Relay, "S", Root, N, Results).

%% The save itself, when its begin is on record, and its payload.
begun(Relay, Root, N, Reason) ->
    Payload = payload(Root, N),
    report(Relay, "B ~s ~b ~b", [Root, N, byte_size(Payload) + 1024]),
    Meta = (meta(Root, N))#{save_reason := Reason},
    Save = fun(Store) -> erllama_cache_writer:save(Store, disk, Meta, Payload, infinity) end,
    {Save, Payload}.

answered(Relay, What, Root, N, Results) ->
    %% Of two that save the same key the later may find it there.
    case [Result || Result <- Results, not is_good(Result)] of
        [] -> ok;
        Bad -> report(Relay, "E save ~s ~b: ~p", [Root, N, Bad])
    end,
    case lists:keymember(ok, 1, Results) of
        true -> report(Relay, "~s ~s ~b", [What, Root, N]);
        false -> report(Relay, "E save ~s ~b: none has saved it: ~p", [Root, N, Results])
    end.

is_good({ok, _Key}) -> true;
is_good({error, Reason}) -> Reason =:= already_present.
