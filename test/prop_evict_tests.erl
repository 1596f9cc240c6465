%% What a bounded store evicts, against a model: files are saved, loaded, pinned, unpinned and
%% deleted in any order, and after each step the store has the files that it should have. The model
%% knows of each file when it was used, and computes weights as the documentation puts them: each
%% use counts 1, and half as much after each half-life.
%%
%% The store says itself at which millisecond a file was used, so nothing here depends on how fast
%% the steps are. The half-life is that of a few steps.
-module(prop_evict_tests).

-include_lib("proper/include/proper.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_store_util, [key/1, meta/1, store_tests/1, with_store/3]).
-import(erllama_cache_test_util, [eventually/1, next_millisecond/0]).

-define(STORE, prop_evict_store).
-define(SEQUENCES, 150).
-define(KEYS, [1, 2, 3, 4, 5, 6, 7]).
%% A file with a payload of so many bytes has ?OVERHEAD more.
-define(UNIT, 10000).
-define(OVERHEAD, 241).
-define(MAX_BYTES, 4 * (?UNIT + ?OVERHEAD)).
%% Milliseconds.
-define(HALF_LIFE, 5).
-define(TTL, 1000).

-record(file, {
    size :: pos_integer(),
    %% Milliseconds, the last one first.
    uses :: [integer(), ...]
}).

-record(model, {
    eviction :: lru | frecency,
    half_life :: pos_integer(),
    files = #{} :: #{integer() => #file{}},
    pinned = #{} :: #{integer() => true}
}).

evict_test_() ->
    store_tests([
        fun what_is_used_least_goes_first/1,
        fun what_is_not_used_goes_in_time/1
    ]).

what_is_used_least_goes_first(Root) -> holds(evicts(Root), ?SEQUENCES).

what_is_not_used_goes_in_time(Root) -> holds(expires(Root), 5).

holds(Property, Count) ->
    Sequences = list_to_integer(os:getenv("PROPER_SEQUENCES", integer_to_list(Count))),
    Options = [{numtests, min(Count, Sequences)}, {to_file, user}, quiet],
    case proper:counterexample(Property, Options) of
        true -> ok;
        [Input] -> ?assertEqual(no_counterexample, Input)
    end.

%%% Eviction

evicts(Root) ->
    %% With the long one nothing is forgotten.
    ?FORALL({Eviction, HalfLife, Steps},
            {oneof([lru, frecency, frecency]), oneof([?HALF_LIFE, 10000]), list(step())},
            passes(fun() -> run(Root, Eviction, HalfLife, Steps) end)).

%% What is raised is printed with the steps that led to it.
passes(Run) ->
    Outcome = erllama_cache_statem_util:step(Run),
    ?WHENFAIL(io:format(user, "~n~p~n", [Outcome]), Outcome =:= true).

step() ->
    Key = oneof(?KEYS),
    frequency([
        {4, {save, Key, oneof([1, 2, 3])}},
        {6, {load, Key}},
        {2, {pin, Key}},
        {3, {unpin, Key}},
        {1, {delete, Key}},
        %% So long that little is left of what was used before.
        {1, {rest, oneof([1, ?HALF_LIFE, 3 * ?HALF_LIFE])}}
    ]).

run(Root, Eviction, HalfLife, Steps) ->
    Options = #{root => Root, max_bytes => ?MAX_BYTES, eviction => Eviction, half_life => HalfLife},
    try
        with_store(?STORE, Options, fun(_) ->
            Model = #model{eviction = Eviction, half_life = HalfLife},
            _ = lists:foldl(fun take/2, Model, Steps)
        end),
        true
    after
        empty(Root)
    end.

empty(Root) ->
    {ok, Names} = file:list_dir(Root),
    [ok = file:delete(filename:join(Root, Name)) || Name <- Names].

take(Step, Model) ->
    next_millisecond(),
    Result = done(Step),
    Next = expected(Step, Result, Model),
    ?assertEqual({Step, lists:sort(maps:keys(Next#model.files))}, {Step, lists:sort(stored())}),
    Next.

done({save, Key, Units}) ->
    erllama_cache_store:save(?STORE, meta(Key), payload(Units));
done({load, Key}) ->
    erllama_cache_store:load(?STORE, key(Key));
done({pin, Key}) ->
    erllama_cache_store:pin(?STORE, key(Key));
done({unpin, Key}) ->
    erllama_cache_store:unpin(?STORE, key(Key));
done({delete, Key}) ->
    erllama_cache_store:delete(?STORE, key(Key));
done({rest, Milliseconds}) ->
    lists:foreach(fun(_) -> next_millisecond() end, lists:seq(1, Milliseconds)).

payload(Units) ->
    <<0:(Units * ?UNIT * 8)>>.

file_size(Units) ->
    Units * ?UNIT + ?OVERHEAD.

expected({save, Key, _}, {error, already_present}, #model{files = Files} = Model) ->
    ?assert(is_map_key(Key, Files)),
    Model;
expected({save, Key, Units}, Result, #model{files = Files} = Model) ->
    ?assertNot(is_map_key(Key, Files)),
    {Roomy, #model{files = Left} = Evicted} = make_room(file_size(Units), Model),
    case Result of
        {ok, _} ->
            ?assertEqual(room, Roomy),
            File = #file{size = file_size(Units), uses = [last_used(Key)]},
            Evicted#model{files = Left#{Key => File}};
        {error, no_room} ->
            ?assertEqual(no_room, Roomy),
            Evicted
    end;
expected({load, Key}, {ok, _, _}, #model{files = Files} = Model) ->
    #{Key := #file{uses = Uses} = File} = Files,
    Model#model{files = Files#{Key := File#file{uses = [last_used(Key) | Uses]}}};
expected({load, Key}, miss, #model{files = Files} = Model) ->
    ?assertNot(is_map_key(Key, Files)),
    Model;
expected({pin, Key}, ok, #model{pinned = Pinned} = Model) ->
    Model#model{pinned = Pinned#{Key => true}};
expected({unpin, Key}, ok, #model{pinned = Pinned} = Model) ->
    Model#model{pinned = maps:remove(Key, Pinned)};
expected({delete, Key}, ok, #model{files = Files} = Model) ->
    Model#model{files = maps:remove(Key, Files)};
expected({rest, _}, _, Model) ->
    Model.

make_room(Needed, #model{files = Files, pinned = Pinned} = Model) ->
    Used = lists:sum([Size || #file{size = Size} <- maps:values(Files)]),
    Free = maps:to_list(maps:without(maps:keys(Pinned), Files)),
    case Free of
        _ when Used + Needed =< ?MAX_BYTES ->
            {room, Model};
        [] ->
            {no_room, Model};
        _ ->
            Now = erlang:system_time(millisecond),
            {_, Key} = lists:min([{weight(Model, File, Now), Key} || {Key, File} <- Free]),
            make_room(Needed, Model#model{files = maps:remove(Key, Files)})
    end.

weight(#model{eviction = lru}, #file{uses = [Last | _]}, _Now) ->
    Last;
weight(#model{half_life = HalfLife}, #file{uses = Uses}, Now) ->
    lists:sum([math:pow(0.5, (Now - Use) / HalfLife) || Use <- Uses]).

last_used(Key) ->
    #{Key := LastUsed} = erllama_cache_store:fold(?STORE, fun(Stored, #{last_used := At}, Times) ->
        Times#{number(Stored) => At}
    end, #{}),
    LastUsed.

stored() ->
    erllama_cache_store:fold(?STORE, fun(Key, _, Keys) -> [number(Key) | Keys] end, []).

number(Key) ->
    [Number] = [Each || Each <- ?KEYS, key(Each) =:= Key],
    Number.

%%% Expiry

%% Some files are used again and again, some are pinned, and the others go: not before their time.
expires(Root) ->
    ?FORALL(Kinds, vector(length(?KEYS), oneof([left, used, pinned])),
        passes(fun() -> run_expiry(Root, lists:zip(?KEYS, Kinds)) end)).

run_expiry(Root, Kinds) ->
    try
        with_store(?STORE, #{root => Root, ttl => ?TTL}, fun(_) ->
            [erllama_cache_store:pin(?STORE, key(Key)) || {Key, pinned} <- Kinds],
            Saved = maps:from_list([
                begin {ok, _} = done({save, Key, 1}), {Key, last_used(Key)} end || {Key, _} <- Kinds
            ]),
            Left = [Key || {Key, left} <- Kinds],
            Stay = lists:sort([Key || {Key, Kind} <- Kinds, Kind =/= left]),
            eventually(fun() ->
                [{ok, _, _} = erllama_cache_store:load(?STORE, key(Key)) || {Key, used} <- Kinds],
                Gone = Left -- stored(),
                Now = erlang:system_time(millisecond),
                [?assert(Now - maps:get(Key, Saved) >= ?TTL) || Key <- Gone],
                length(Gone) =:= length(Left)
            end),
            ?assertEqual(Stay, lists:sort(stored())),
            %% A file that has gone is counted right after that.
            eventually(fun() ->
                maps:get(expired, erllama_cache_store:info(?STORE)) =:= length(Left)
            end),
            [erllama_cache_store:unpin(?STORE, key(Key)) || {Key, pinned} <- Kinds],
            eventually(fun() -> stored() =:= [] end)
        end),
        true
    after
        empty(Root)
    end.
